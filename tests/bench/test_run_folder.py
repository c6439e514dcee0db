"""The folder of a run: new, resumed or refused; files are replaced atomically, and an empty folder is removed."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

import robustkit
from robustkit.bench import Case, Plan, read_plan
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.run_folder import SCHEMA, open_folder
from robustkit.errors import ArgumentError

PLAN = Plan((Case("zoo:digits-mlp", "linf:0.1", "fgsm"), Case("zoo:digits-mlp", "linf:0.2", "fgsm")), "digits", limit=20)
LOADED = load(PLAN)
DONE = list(outcomes(LOADED))


def written(path, count=2, resume=False):
    with open_folder(path, LOADED.plan, resume=resume) as folder:
        folder.begin(LOADED)
        folder.write(LOADED, DONE[:count])


def content(root):
    files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def test_the_written_files_can_be_read(tmp_path):
    out = tmp_path / "out"
    written(out)
    assert content(out).keys() == {"results.json", "report.html", "plan.toml"}
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (results["robustkit"], results["schema"]) == (robustkit.__version__, SCHEMA)
    assert results["environment"] == LOADED.environment
    assert results["command"] == (
        "robustkit bench --model zoo:digits-mlp --data digits --limit 20 --threat linf:0.1 --threat linf:0.2 --attack fgsm"
    )
    assert results["data"] == {"spec": "digits", "offset": 0, "limit": 20}
    assert results["records"] == [outcome.record for outcome in DONE]
    assert [(row["threat"], row["n"]) for row in results["worst_case"]] == [("linf:0.1", 20), ("linf:0.2", 20)]
    plan = read_plan(out / "plan.toml")
    assert plan == PLAN
    assert plan.expected_hashes == LOADED.plan.expected_hashes
    assert plan.expected_hashes.keys() == {"digits", "zoo:digits-mlp"}
    assert "linf:0.2" in (out / "report.html").read_text(encoding="utf-8")


def test_records_are_in_the_order_of_the_plan_whatever_finished_first(tmp_path):
    with open_folder(tmp_path / "out", LOADED.plan) as folder:
        folder.begin(LOADED)
        assert folder.write(LOADED, DONE[::-1])["records"] == [outcome.record for outcome in DONE]


def half(self, content):
    with open(self, "wb") as file:
        file.write(content[: len(content) // 2])
    raise OSError(28, "No space left on device")


def refused(source, target):
    raise OSError(13, "Permission denied")


@pytest.mark.parametrize(("place", "name", "failure"), [(Path, "write_bytes", half), (os, "replace", refused)])
def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch, place, name, failure):
    written(tmp_path / "out", 1)
    before = content(tmp_path)
    monkeypatch.setattr(place, name, failure)
    with pytest.raises(OSError, match=r"No space|Permission"):
        written(tmp_path / "out", resume=True)
    assert content(tmp_path) == before


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """A file name refers to the complete old file until it is replaced by the complete new one."""
    out = tmp_path / "out"
    written(out, 1)
    before, seen, real = content(out), [], os.replace

    def watched(source, target):
        seen.append((target.name, target.read_bytes() == before[target.name]))
        assert Path(source).read_text().rstrip().endswith(("}", "</html>"))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    written(out, resume=True)
    assert seen == [("results.json", True), ("report.html", True)]


@pytest.mark.parametrize("kind", ["empty folder", "full folder", "file", "a run"])
def test_an_existing_folder_or_file_is_refused_and_unchanged(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "a run":
        written(out)
    else:
        out.mkdir()
    if kind == "full folder":
        (out / "mine").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ArgumentError, match=r"exists, and nothing is overwritten; .*--resume"), open_folder(out, LOADED.plan):
        raise AssertionError("not reached")
    assert content(tmp_path) == before
    assert os.path.lexists(out)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "is not a folder"),
        ("other files", "contains 'mine' but no run"),
        ("old results", "contains 'results.json' but no run"),
        ("no", None),
    ],
)
def test_resume_starts_a_run_in_a_new_folder_and_refuses_other_content(tmp_path, kind, message):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind != "no":
        out.mkdir()
        (out / ("mine" if kind == "other files" else "results.json")).write_text("mine")
    before = content(tmp_path)
    if message is None:
        written(out, resume=True)
        assert read_plan(out / "plan.toml") == PLAN
    else:
        with pytest.raises(ArgumentError, match=message):
            written(out, resume=True)
        assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"\(different: seed\)"),
        ({"limit": 19, "block": 7}, r"\(different: limit, block\)"),
        ({"cases": PLAN.cases[:1]}, r"\(different: cases\)"),
        ({"expected_hashes": {**LOADED.plan.expected_hashes, "digits": "0"}}, r"\(different: hashes\)"),
    ],
)
def test_a_run_of_another_plan_is_not_resumed(tmp_path, change, message):
    out = tmp_path / "out"
    written(out)
    before = content(out)
    message += r"; name a new folder, or resume that run: robustkit bench --out"
    other = replace(LOADED.plan, **change)
    with pytest.raises(ArgumentError, match=message), open_folder(out, other, resume=True):
        raise AssertionError("not reached")
    assert content(out) == before


def test_a_run_of_another_environment_is_not_resumed(tmp_path):
    out = tmp_path / "out"
    written(out)
    results = json.loads((out / "results.json").read_text())
    results["environment"]["torch"] = "1.0"
    (out / "results.json").write_text(json.dumps(results))
    before = content(out)
    message = r"begun in another environment \(torch was 1\.0, is .*\), and its numbers must not be mixed"
    with pytest.raises(ArgumentError, match=message):
        written(out, resume=True)
    assert content(out) == before


def test_a_folder_in_use_is_refused(tmp_path):
    out = tmp_path / "out"
    written(out)
    message = "is in use by another run; wait for it, or name another folder"
    with open_folder(out, LOADED.plan, resume=True), pytest.raises(ArgumentError, match=message):
        written(out, resume=True)
    written(out, resume=True)


@pytest.mark.parametrize("kind", ["under a file", "too long", "dead link"])
def test_a_folder_that_cannot_be_created_is_refused(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    out = {"under a file": tmp_path / "file" / "a" / "b", "too long": tmp_path / ("x" * 300), "dead link": tmp_path / "link"}
    if kind == "dead link":
        out[kind].symlink_to(tmp_path / "nowhere" / "deep")
    with pytest.raises(ArgumentError, match=r"cannot be written .*; name another folder"), open_folder(out[kind], LOADED.plan):
        raise AssertionError("not reached")
    assert content(tmp_path) == {"file": b"mine"}


def fails(out, error, *, write):
    """A run that fails, before or after its first write."""
    with open_folder(out, LOADED.plan) as folder:
        assert folder.path.is_dir()
        if write:
            folder.begin(LOADED)
        raise error


@pytest.mark.parametrize("error", [ArgumentError, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_fails_before_anything_is_written_leaves_nothing(tmp_path, error):
    (tmp_path / "mine").mkdir()
    with pytest.raises(error):
        fails(tmp_path / "mine" / "a" / "b", error, write=False)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_run_that_fails_later_keeps_the_written_files(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fails(tmp_path / "a", KeyboardInterrupt, write=True)
    assert content(tmp_path).keys() == {"a/results.json", "a/plan.toml"}


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path):
    loaded = load(PLAN)
    loaded.plan = replace(loaded.plan, expected_hashes={os.fsdecode(b"net\xff.py:net"): "0"})
    with pytest.raises(ArgumentError, match="is not valid Unicode"), open_folder(tmp_path / "out", loaded.plan) as folder:
        folder.begin(loaded)
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_named_by_the_date(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_folder(None, LOADED.plan) as folder:
        folder.begin(LOADED)
    (path,) = (tmp_path / "runs").iterdir()
    assert path == tmp_path / folder.path
    assert len(path.name) == len("2026-01-31-235959")


def test_the_environment_has_only_versions_and_hardware():
    environment = LOADED.environment
    assert environment.keys() == {"robustkit", "python", "torch", "numpy", "platform", "threads", "device"}
    assert (environment["device"], environment["threads"]) == ("cpu", 1)
    assert str(os.getpid()) not in str(environment)
