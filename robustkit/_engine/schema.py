"""The schema version of result files, and how files of an older version are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["SCHEMA", "upgrade_record", "upgrade_results"]

SCHEMA: Final = 2
_NEW_NAMES: Final = {  # of stages and checks in schema 2, by their names in schema 1
    "look": "first-pass",
    "border": "boundary",
    "windows": "patches",
    "polish": "refine",
    "border-breaks": "boundary-breaks",
}


def upgrade_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the flags, notes, stages and checks of a result, a block or a record to schema 2; other keys stay."""
    if "evidence" not in record:
        return dict(record)
    upgraded = {"checks" if key == "evidence" else key: value for key, value in record.items()}
    for key in ("flags", "notes", "stages", "checks"):
        if key in upgraded:
            upgraded[key] = [{**item, "name": _NEW_NAMES.get(item["name"], item["name"])} for item in upgraded[key]]
    return upgraded


def upgrade_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the content of a results.json to schema 2; one of schema 2 is returned unchanged."""
    if results.get("schema", 1) >= SCHEMA:
        return dict(results)
    upgraded = {"worst_case" if key == "together" else key: value for key, value in results.items()}
    return upgraded | {"schema": SCHEMA, "records": [upgrade_record(record) for record in results["records"]]}
