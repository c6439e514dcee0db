"""The schema of files that hold results, and how those of an older one are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SCHEMA", "upgrade_facts", "upgrade_results"]

SCHEMA: Final = 2
# Schema 1 to 2: what flags and notes follow from, and the stages of `Standard`, have the field's words.
_NAMES: Final = {
    "look": "first-pass",
    "border": "boundary",
    "windows": "patches",
    "polish": "refine",
    "border-breaks": "boundary-breaks",
}


def upgrade_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, notes, stages and checks of a result, a block or a record, in the names of schema 2; other keys stay."""
    if "evidence" not in facts:
        return dict(facts)
    renamed = {"checks" if key == "evidence" else key: value for key, value in facts.items()}
    lists = {key: renamed[key] for key in ("flags", "notes", "stages", "checks") if key in renamed}
    return renamed | {key: [{**item, "name": _NAMES.get(item["name"], item["name"])} for item in lists[key]] for key in lists}


def upgrade_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a results.json in schema 2; one that is in schema 2 comes back as it is."""
    if results.get("schema", 1) >= SCHEMA:
        return dict(results)
    renamed = {"worst_case" if key == "together" else key: value for key, value in results.items()}
    return renamed | {"schema": SCHEMA, "records": [upgrade_facts(record) for record in results["records"]]}
