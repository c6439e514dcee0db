"""A run as JUnit XML, for continuous integration."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from robustkit.bench.comparison.gates import Verdict
from robustkit.bench.plan.plan import model_under_test_name

__all__ = ["junit"]

# All characters that XML 1.0 forbids or discourages, and \r, which a parser turns into \n.
_FORBIDDEN = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(results: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """The run as JUnit XML: a test case for each record and for each verdict of a gate.

    Only gates can fail; records always pass. The flags of a record are its output. Characters that XML forbids are written
    as Python escapes, such as \\x1b. Equal arguments give equal text.

    Args:
        results: The content of results.json.
        verdicts: The verdicts of the gates; may be empty.

    Returns:
        One XML document, to be written as UTF-8.
    """
    records = results["records"]
    failures = sum(not verdict.passed for verdict in verdicts)
    counts = {
        "tests": str(len(records) + len(verdicts)),
        "failures": str(failures),
        "errors": "0",
        "skipped": "0",
        "time": _seconds(sum(record["seconds"] for record in records)),
    }
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "robustkit", **counts})
    for record in records:
        _add_record(suite, record)
    for verdict in verdicts:
        _add_verdict(suite, verdict)
    ElementTree.indent(root)
    # The declaration is written here, because ElementTree would name the encoding of the terminal.
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_record(suite: ElementTree.Element, record: Mapping[str, Any]) -> None:
    names = {
        "classname": _safe(model_under_test_name(record["model"], record.get("defence"))),
        "name": _safe(f"{record['threat']} {record['attack']} {record['goal']} {record['seed']}"),
    }
    case = ElementTree.SubElement(suite, "testcase", names | {"time": _seconds(record["seconds"])})
    if record["flags"]:
        lines = [f"! {flag['name']}: {flag['why']}" for flag in record["flags"]]
        ElementTree.SubElement(case, "system-out").text = _safe("\n".join(lines))


def _add_verdict(suite: ElementTree.Element, verdict: Verdict) -> None:
    names = {"classname": "robustkit gate", "name": _safe(verdict.name), "time": _seconds(0)}
    case = ElementTree.SubElement(suite, "testcase", names)
    if verdict.passed:
        ElementTree.SubElement(case, "system-out").text = _safe(verdict.why)
    else:
        failure = ElementTree.SubElement(case, "failure", {"message": _safe(verdict.why), "type": "gate"})
        failure.text = _safe(f"{verdict.name}\n{verdict.why}")


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _safe(text: str) -> str:
    return _FORBIDDEN.sub(lambda match: ascii(match.group())[1:-1], text)
