"""The folder of a run: new or refused, never half written, gone again if nothing was written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import robustkit
from robustkit.bench import Outcome, folder
from robustkit.errors import ArgumentError

RECORD = {
    "model": "m", "data": "d", "defence": None, "goal": "misclassify", "threat": "linf:0.3", "attack": "pgd", "seed": 0,
    "n": 100, "clean_accuracy": 0.97, "robust_accuracy": 0.123, "success_rate": 0.877, "low": 0.07, "high": 0.2,
    "median_size": 0.3, "forwards": 4100, "backwards": 4000, "seconds": 1.5, "access": "white", "flags": [], "notes": [],
}  # fmt: skip


def written(path, *models):
    outcomes = [Outcome(RECORD | {"model": model}, (), np.arange(100) < 12) for model in models]
    folder.write(path, outcomes, device="cpu", command="robustkit bench")


def content(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_written_can_be_read(tmp_path):
    written(tmp_path, "first")
    written(tmp_path, "first", "sécond")
    assert content(tmp_path).keys() == {"results.json", "report.html"}
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert (results["robustkit"], results["schema"]) == (robustkit.__version__, 1)
    assert results["environment"] == folder.environment("cpu")
    assert results["command"] == "robustkit bench"
    assert [record["model"] for record in results["records"]] == ["first", "sécond"]
    assert [(record["model"], record["robust_accuracy"]) for record in results["together"]] == [
        ("first", 0.12),
        ("sécond", 0.12),
    ]
    assert "sécond" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_file_name_that_is_no_unicode_can_be_written_and_read(tmp_path):
    name = os.fsdecode(b"net\xff.py:net")
    written(tmp_path, name)
    (record,) = json.loads((tmp_path / "results.json").read_bytes().decode("utf-8"))["records"]
    assert record["model"] == name


def half(self, text, **options):
    self.write_bytes(text[: len(text) // 2].encode())
    raise OSError(28, "No space left on device")


def refused(source, target):
    raise OSError(13, "Permission denied")


@pytest.mark.parametrize(("place", "name", "failure"), [(Path, "write_text", half), (os, "replace", refused)])
def test_a_failing_write_leaves_the_old_files(tmp_path, monkeypatch, place, name, failure):
    written(tmp_path, "first")
    before = content(tmp_path)
    monkeypatch.setattr(place, name, failure)
    with pytest.raises(OSError, match=r"No space|Permission"):
        written(tmp_path, "first", "second")
    assert content(tmp_path) == before


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    """Until the very end the name stands for the whole old file, from then on for the whole new one."""
    written(tmp_path, "first")
    before, seen, real = content(tmp_path), [], os.replace

    def watched(source, target):
        seen.append((target.name, target.read_bytes() == before[target.name]))
        assert Path(source).read_text().rstrip().endswith(("}", "</html>"))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    written(tmp_path, "second")
    assert seen == [("results.json", True), ("report.html", True)]


@pytest.mark.parametrize("kind", ["empty folder", "full folder", "file", "dead link"])
def test_what_exists_is_refused_and_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dead link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
    if kind == "full folder":
        (out / "results.json").write_text("mine")
    before = content(tmp_path)
    with pytest.raises(ArgumentError, match="exists; nothing is overwritten: name a new folder"), folder.new_folder(out):
        raise AssertionError("not reached")
    assert content(tmp_path) == before
    assert os.path.lexists(out)


@pytest.mark.parametrize("kind", ["under a file", "too long"])
def test_what_cannot_be_made_is_refused(tmp_path, kind):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "a" / "b" if kind == "under a file" else tmp_path / ("x" * 300)
    with pytest.raises(ArgumentError, match=r"cannot be made .*; name another folder"), folder.new_folder(out):
        raise AssertionError("not reached")
    assert content(tmp_path) == {"file": b"mine"}


def fails(out, error, *models):
    """A run that writes some records and fails."""
    with folder.new_folder(out) as made:
        assert made.is_dir()
        if models:
            written(made, *models)
        raise error


@pytest.mark.parametrize("error", [ArgumentError, KeyboardInterrupt, ZeroDivisionError])
def test_a_run_that_fails_before_anything_is_written_leaves_nothing(tmp_path, error):
    (tmp_path / "mine").mkdir()
    with pytest.raises(error):
        fails(tmp_path / "mine" / "a" / "b", error)
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_run_that_fails_later_leaves_what_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fails(tmp_path / "a", KeyboardInterrupt, "first")
    assert content(tmp_path).keys() == {"a/results.json", "a/report.html"}


def test_without_a_name_a_folder_has_the_date(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with folder.new_folder(None) as made:
        (made / "something").touch()
    (found,) = (tmp_path / "runs").iterdir()
    assert found == tmp_path / made
    assert len(found.name) == len("2026-01-31-235959")


def test_the_environment_tells_versions_and_hardware_alone():
    told = folder.environment("cpu")
    assert told.keys() == {"python", "torch", "numpy", "platform", "threads", "device"}
    assert told["device"] == "cpu"
    assert str(os.getpid()) not in str(told)
