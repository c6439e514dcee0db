"""The run as JUnit XML, read back by a parser, with names that XML forbids."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.bench.comparison.gates import Verdict
from robustkit.bench.reporting.junit import junit

RECORD = {
    "model": "zoo:m",
    "defence": None,
    "goal": "misclassify",
    "threat": "linf:0.1",
    "attack": "pgd",
    "seed": 3,
    "seconds": 1.25,
    "flags": [],
}
GOOD, BAD = Verdict("m, linf:0.1: at least 90.0%", True, "95.0%"), Verdict("m, l2:1: at least 90.0%", False, "89.0%")


def suite_of(records, verdicts=()):
    root = ElementTree.fromstring(junit({"records": records}, verdicts).encode("utf-8"))
    (suite,) = root
    assert (root.tag, suite.tag, suite.get("name")) == ("testsuites", "testsuite", "robustkit")
    assert {**root.attrib, "name": "robustkit"} == suite.attrib
    return suite


def test_records_and_verdicts_are_test_cases_and_are_counted():
    suite = suite_of([RECORD, RECORD | {"attack": "fgsm", "seconds": 0.5, "defence": "jpeg"}], [GOOD, BAD, GOOD])
    assert dict(suite.attrib) == {
        "name": "robustkit",
        "tests": "5",
        "failures": "1",
        "errors": "0",
        "skipped": "0",
        "time": "1.750",
    }
    assert [dict(case.attrib) for case in suite] == [
        {"classname": "zoo:m", "name": "linf:0.1 pgd misclassify 3", "time": "1.250"},
        {"classname": "zoo:m behind jpeg", "name": "linf:0.1 fgsm misclassify 3", "time": "0.500"},
        *[{"classname": "robustkit gate", "name": verdict.name, "time": "0.000"} for verdict in (GOOD, BAD, GOOD)],
    ]
    assert {case.tag for case in suite} == {"testcase"}
    assert [len(case.findall("failure")) for case in suite] == [0, 0, 0, 1, 0]
    failure = suite[3].find("failure")
    assert failure.get("message") == BAD.why
    assert failure.text == f"{BAD.name}\n{BAD.why}"
    assert suite[2].find("system-out").text == GOOD.why


def test_flags_are_output_and_not_failures():
    flags = [{"name": "weak-attack", "why": "for a reason"}, {"name": "other", "why": "as well"}]
    suite = suite_of([RECORD | {"flags": flags}, RECORD])
    assert suite.get("failures") == "0"
    assert [child.tag for child in suite[0]] == ["system-out"]
    assert suite[0][0].text == "! weak-attack: for a reason\n! other: as well"
    assert len(suite[1]) == 0


def test_an_empty_run_is_a_valid_document():
    suite = suite_of([])
    assert (suite.get("tests"), suite.get("failures"), suite.get("time"), len(suite)) == ("0", "0", "0.000", 0)


@pytest.mark.parametrize(
    ("name", "escaped"),
    [
        ("a\x00b", r"a\x00b"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\udcff", r"\udcff"),
        ("\ufffe\uffff", r"\ufffe\uffff"),
        ("\r", r"\r"),
        ("\x85", r"\x85"),
        ("\x7f", r"\x7f"),
        ("<&>\"'", "<&>\"'"),
        ("]]>", "]]>"),
        ("x\ty\nz", "x\ty\nz"),
        ("é−𝔸", "é−𝔸"),
    ],
)
def test_hostile_names_are_escaped(name, escaped):
    record = RECORD | dict.fromkeys(("model", "threat", "attack", "goal"), name) | {"flags": [{"name": name, "why": name}]}
    suite = suite_of([record], [Verdict(name, False, name), Verdict(name, True, name)])
    assert suite[0].get("classname") == escaped
    assert suite[0].get("name") == f"{escaped} {escaped} {escaped} 3"
    assert suite[0][0].text == f"! {escaped}: {escaped}"
    assert suite[1].get("name") == suite[1][0].get("message") == suite[2][0].text == escaped
    assert suite[1][0].text == f"{escaped}\n{escaped}"


@given(st.text(st.characters(exclude_categories=()), max_size=20))
def test_any_text_is_read_back_verbatim_or_escaped(name):
    suite = suite_of([RECORD | {"model": name}], [Verdict(name, True, name)])
    escaped = suite[0].get("classname")
    assert escaped == suite[1].get("name")
    unescaped = re.sub(
        r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|r)", lambda match: match.group().encode().decode("unicode_escape"), escaped
    )
    assert "\\" in name or unescaped == name
    if name.isprintable():
        assert escaped == name


def test_equal_runs_give_equal_text_that_can_be_written(tmp_path):
    arguments = {"records": [RECORD, RECORD | {"model": "\udcff"}]}, [GOOD, BAD]
    text = junit(*arguments)
    assert text == junit(*arguments)
    assert text.startswith('<?xml version="1.0" encoding="utf-8"?>\n<testsuites ')
    assert text.endswith("</testsuites>\n")
    path = Path(tmp_path, "junit.xml")
    path.write_text(text, encoding="utf-8")
    assert len(ElementTree.parse(path).findall(".//testcase")) == 4
