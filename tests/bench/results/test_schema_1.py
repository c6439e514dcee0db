"""A run of schema 1, as an earlier version wrote it: it is read, compared, reported and resumed like one of schema 2."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustkit._engine.schema import SCHEMA
from robustkit.bench.comparison.compare import compare
from robustkit.bench.results.block import Block
from robustkit.bench.results.read_run import read
from robustkit.bench.results.solved_by import solvers
from robustkit.cli import main

STORED = Path(__file__).parents[1] / "schema_1"
OLD_NAMES = {"look", "border", "windows", "polish", "border-breaks"}
STAGES = ["clean", "first-pass", "patches", "parts", "boundary", "restarts", "audit", "attack"]


@pytest.fixture
def old(tmp_path):
    """A copy of the stored run."""
    return shutil.copytree(STORED, tmp_path / "old")


def load(path):
    return json.loads((path / "results.json").read_text(encoding="utf-8"))


def named(results):
    """Everything in a results.json that has a name of its own."""
    return [item["name"] for record in results["records"] for key in ("stages", "checks") for item in record[key]]


def blocks(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}


def without_seconds(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_the_stored_run_has_schema_1():
    stored = load(STORED)
    assert stored["schema"] == 1
    assert "together" in stored
    assert all("evidence" in record for record in stored["records"])
    names = {stage["name"] for record in stored["records"] for stage in record["stages"]}
    assert {"look", "border", "windows"} <= names
    assert {check["name"] for record in stored["records"] for check in record["evidence"]} & OLD_NAMES == {"border-breaks"}


def test_reading_gives_the_keys_and_names_of_schema_2(old):
    stored, results = load(STORED), read(old).results
    assert results["schema"] == SCHEMA == 2
    assert results.keys() == {"worst_case" if key == "together" else key for key in stored}
    assert results["worst_case"] == stored["together"]
    for before, after in zip(stored["records"], results["records"], strict=True):
        assert after.keys() == {"checks" if key == "evidence" else key for key in before}
        same = before.keys() - {"evidence", "stages"}
        assert {key: after[key] for key in same} == {key: before[key] for key in same}
        for key, old_key in (("stages", "stages"), ("checks", "evidence")):
            numbers = [{**item, "name": ""} for item in after[key]]
            assert numbers == [{**item, "name": ""} for item in before[old_key]]
    assert OLD_NAMES & set(named(results)) == set()
    assert [stage["name"] for stage in results["records"][1]["stages"]] == STAGES
    assert results["records"][1]["checks"][0]["name"] == "boundary-breaks"


def test_blocks_have_the_names_of_schema_2_and_the_numbers_of_the_records(old):
    run = read(old)
    for record, robust in zip(run.results["records"], run.robust, strict=True):
        assert len(robust) == record["n"]
        assert float(robust.mean()) == record["robust_accuracy"]
    for file in sorted(old.rglob("case-02/*.safetensors")):
        result = Block.load(file).result
        assert [stage.name for stage in result.stages] == STAGES
        assert result.checks[0].name == "boundary-breaks"


def test_each_image_has_the_stage_that_solved_it(old):
    run = read(old)
    for record, names in zip(run.results["records"], solvers(run), strict=True):
        counts = {str(name): int((names == name).sum()) for name in np.unique(names) if name}
        assert counts == {stage["name"]: stage["solved"] for stage in record["stages"] if stage["solved"]}


def test_comparing_it_with_itself_finds_no_difference(old):
    run = read(old)
    comparison = compare(run, run, (solvers(run), solvers(run)))
    assert comparison.only_in_a == comparison.only_in_b == ()
    cases = [pair for pair in comparison.pairs if not pair.worst_case]
    worst = [pair for pair in comparison.pairs if pair.worst_case]
    assert [pair.robust_a for pair in cases] == [record["robust_accuracy"] for record in run.results["records"]]
    assert [pair.robust_a for pair in worst] == [row["robust_accuracy"] for row in run.results["worst_case"]]
    for pair in comparison.pairs:
        assert (pair.only_a, pair.only_b, pair.p) == (0, 0, 1.0)
    for pair, record in zip(cases, run.results["records"], strict=True):
        assert [stage.name for stage in pair.stages] == [stage["name"] for stage in record["stages"]]
        assert all(stage.a == stage.b == stage.both for stage in pair.stages)


def test_report_writes_its_page_and_leaves_the_rest(old, capsys):
    before = load(old), blocks(old)
    assert main(["report", str(old)]) == 0
    printed = capsys.readouterr().out
    assert "standard" in printed
    assert "first-pass" not in printed
    page = (old / "report.html").read_text(encoding="utf-8")
    assert "boundary" in page
    assert (load(old), blocks(old)) == before


def test_resuming_computes_nothing_and_gives_the_same_numbers_or_is_refused_in_one_line(old, capsys):
    # Bits depend on the processor and on versions: elsewhere the run must not be resumed.
    before, files = load(old), blocks(old)
    code = main(["bench", "--out", str(old), "--resume"])
    printed = capsys.readouterr()
    assert blocks(old) == files
    if code == 2:
        assert len(printed.err.strip().splitlines()) == 1
        assert "name a new folder" in printed.err
        assert load(old) == before
        return
    assert code == 0
    after = load(old)
    assert after["schema"] == SCHEMA
    assert after["worst_case"] == before["together"]
    assert after["records"] == read(STORED).results["records"]


def test_after_resuming_it_is_read_compared_and_resumed_again(old, capsys):
    if main(["bench", "--out", str(old), "--resume"]) == 2:
        pytest.skip("another processor or version: the run is refused")
    resumed, stored = read(old), read(STORED)
    assert all((a == b).all() for a, b in zip(resumed.robust, stored.robust, strict=True))
    assert {pair.p for pair in compare(stored, resumed).pairs} == {1.0}
    assert main(["report", str(old)]) == 0
    assert main(["bench", "--out", str(old), "--resume"]) == 0
    assert without_seconds(load(old)["records"]) == without_seconds(stored.results["records"])


def test_a_missing_block_is_computed_again_with_the_same_numbers(old, capsys):
    file = next((old / "examples" / "case-02").glob("0000010-*.safetensors"))
    lost, file_name = Block.load(file), file.name
    file.unlink()
    if main(["bench", "--out", str(old), "--resume"]) == 2:
        pytest.skip("another processor or version: the run is refused")
    again = Block.load(old / "examples" / "case-02" / file_name)
    for name in ("success", "rate", "size", "forwards", "backwards", "flat", "solver"):
        assert getattr(again.result, name).equal(getattr(lost.result, name)), name
    assert (again.result.stages, again.result.checks) == (lost.result.stages, lost.result.checks)
    assert without_seconds(load(old)["records"]) == without_seconds(read(STORED).results["records"])
