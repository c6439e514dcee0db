"""The comparison of two runs: counts against single images, which records are paired, and refusals."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from robustkit import bench
from robustkit.bench import Case, Plan
from robustkit.bench.comparison.compare import compare, label
from robustkit.bench.reporting.compare_table import as_json, comparison_table
from robustkit.bench.results import read_run as past
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.record import worst_case
from robustkit.bench.results.solved_by import solvers
from robustkit.bench.statistics.intervals import tango
from robustkit.bench.statistics.paired_tests import holm, mcnemar
from robustkit.commands.compare import compare_command
from robustkit.errors import ArgumentError

N = 40
RECORD = {
    "model": "m",
    "data": "digits",
    "defence": None,
    "goal": "misclassify",
    "threat": "linf:0.1",
    "attack": "pgd",
    "recipe": "PGD()",
    "seed": 0,
    "n": N,
    "clean_accuracy": 1.0,
    "flags": [],
    "notes": [],
    "data_hash": "d0",
}
FLAG = {"name": "flat-gradients", "why": "no signal"}
HOSTILE = ["net[0].py:[bold]x[/bold]", "a:smile:b", "[/]", "back\\slash\\", "[link=file:x]y", "\udcff", "x\ny"]


def run(*rows, path="/runs/x", schema=1, **more):
    """A run of records, each given by its differences from RECORD and its mask of robust images."""
    records = [RECORD | changed | {"n": changed.get("n", len(mask))} for changed, mask in rows]
    return Run(Path(path), {"schema": schema, "records": records} | more, tuple(np.array(mask, bool) for _, mask in rows))


def mask(seed, share=0.6, n=N):
    return np.random.default_rng(seed).random(n) < share


def refused(a, b):
    with pytest.raises(ArgumentError) as error:
        compare(a, b)
    assert "\n" not in str(error.value)
    return str(error.value)


def shown(comparison, width=80):
    file = io.StringIO()
    Console(width=width, file=file, color_system=None).print(comparison_table(comparison))
    return file.getvalue()


# Laws

MASKS = st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.booleans(), min_size=n, max_size=n)] * 4))


@given(MASKS)
def test_counts_are_those_of_single_images(masks):
    a1, a2, b1, b2 = masks
    rows = ({"attack": "pgd"}, {"attack": "fgsm", "goal": "least-likely"})
    a, b = run((rows[0], a1), (rows[1], a2)), run((rows[0], b1), (rows[1], b2))
    pairs = compare(a, b).pairs
    both_a, both_b = ([x and y for x, y in zip(*two, strict=True)] for two in ((a1, a2), (b1, b2)))
    for pair, x, y in zip(pairs, (a1, a2, both_a), (b1, b2, both_b), strict=True):
        cases = list(zip(x, y, strict=True))
        counts = [cases.count(case) for case in ((True, False), (False, True), (True, True), (False, False))]
        assert [pair.only_a, pair.only_b, pair.both, pair.neither] == counts
        assert (pair.n, pair.robust_a, pair.robust_b) == (len(x), sum(x) / len(x), sum(y) / len(y))
        assert pair.difference == pytest.approx(pair.robust_b - pair.robust_a)
        assert (pair.p, (pair.low, pair.high)) == (mcnemar(*counts[:2]), tango(*counts[:2], len(x)))
    assert [pair.worst_case for pair in pairs] == [False, False, True]
    for side, it in (("robust_a", a), ("robust_b", b)):  # the worst case that the run itself reports
        (entry,) = worst_case(list(zip(it.results["records"], it.robust, strict=True)))
        assert getattr(pairs[2], side) == entry["robust_accuracy"]
        assert list(pairs[2].attacks) == entry["attacks"]


@given(MASKS)
def test_a_run_against_itself_and_the_runs_swapped(masks):
    a, b = (run(({}, x), ({"threat": "l2:1"}, y)) for x, y in (masks[:2], masks[2:]))
    for pair in compare(a, a).pairs:
        assert (pair.p, pair.difference, pair.only_a, pair.only_b, pair.low) == (1.0, 0.0, 0, 0, -pair.high)
    for one, other in zip(compare(a, b).pairs, compare(b, a).pairs, strict=True):
        assert (one.only_a, one.only_b, one.both, one.neither) == (other.only_b, other.only_a, other.both, other.neither)
        assert (one.p, one.low, one.high) == (other.p, -other.high, -other.low)
        assert -1 <= one.low <= one.difference <= one.high <= 1


# Which records are paired


def test_pairs_name_their_records_and_are_in_the_order_of_a():
    rows = [({"threat": t, "attack": x}, mask(i)) for i, (t, x) in enumerate(itertools.product(["l2:1", "linf:1"], "ab"))]
    comparison = compare(run(*rows), run(*reversed(rows)))
    assert [(pair.threat, pair.attack, pair.goal, pair.seed) for pair in comparison.pairs] == [
        ("l2:1", "a", "misclassify", 0),
        ("l2:1", "b", "misclassify", 0),
        ("linf:1", "a", "misclassify", 0),
        ("linf:1", "b", "misclassify", 0),
        ("l2:1", None, None, 0),
        ("linf:1", None, None, 0),
    ]
    assert comparison.only_in_a == comparison.only_in_b == ()
    assert all((pair.model_a, pair.model_b, pair.data) == ("m", "m", "digits") for pair in comparison.pairs)
    assert [pair.robust_a for pair in comparison.pairs[:4]] == [m.mean() for _, m in rows]
    assert all(pair.difference == 0 for pair in comparison.pairs)


@pytest.mark.parametrize(
    "other", [{"threat": "l2:1"}, {"goal": "least-likely"}, {"attack": "fgsm"}, {"recipe": "PGD(steps=1)"}, {"seed": 1}]
)
def test_only_equal_cases_are_compared_and_the_others_are_listed(other):
    comparison = compare(run((other, mask(1)), ({}, mask(0))), run(({}, mask(2))))
    assert {(pair.robust_a, pair.robust_b) for pair in comparison.pairs} == {(mask(0).mean(), mask(2).mean())}
    assert [label(record) for record in comparison.only_in_a] == [label(RECORD | other)]
    assert label(RECORD | other) != label(RECORD)
    assert comparison.only_in_b == ()
    # The worst case is compared only where both runs have the same attacks.
    assert len(comparison.pairs) == (2 if "threat" in other else 1)
    assert [pair.worst_case for pair in comparison.pairs][1:] == ([True] if "threat" in other else [])
    swapped = compare(run(({}, mask(2))), run((other, mask(1)), ({}, mask(0))))
    assert (swapped.only_in_a, swapped.only_in_b) == ((), comparison.only_in_a)
    assert len(swapped.pairs) == len(comparison.pairs)


def test_single_models_are_paired_whatever_their_names():
    comparison = compare(run(({"model": "old"}, mask(0))), run(({"model": "new", "defence": "jpeg"}, mask(1))))
    pair = comparison.pairs[0]
    assert (pair.model_a, pair.model_b, pair.defence_a, pair.defence_b) == ("old", "new", None, "jpeg")
    assert len(comparison.pairs) == 2


def test_several_models_are_paired_by_name():
    a = run(({"model": "x"}, mask(0)), ({"model": "y"}, mask(1)))
    b = run(({"model": "y"}, mask(2)), ({"model": "z"}, mask(3)))
    comparison = compare(a, b)
    assert [(pair.model_a, pair.model_b, pair.robust_a, pair.robust_b) for pair in comparison.pairs] == [
        ("y", "y", mask(1).mean(), mask(2).mean())
    ] * 2
    assert ([r["model"] for r in comparison.only_in_a], [r["model"] for r in comparison.only_in_b]) == (["x"], ["z"])
    with_one_model = compare(a, run(({"model": "y"}, mask(2))))  # two models and one are paired by name too
    assert {(pair.model_a, pair.model_b) for pair in with_one_model.pairs} == {("y", "y")}


def test_several_defences_are_paired_by_name():
    a = run(({"defence": None}, mask(0)), ({"defence": "jpeg"}, mask(1)))
    comparison = compare(a, run(({"defence": "jpeg", "model": "other"}, mask(2))))
    assert [(pair.defence_a, pair.defence_b, pair.robust_a) for pair in comparison.pairs] == [
        ("jpeg", "jpeg", mask(1).mean())
    ] * 2
    assert len(comparison.only_in_a) == 1


def test_equal_records_are_paired_in_their_order():
    a, b = run(({}, mask(0)), ({}, mask(1))), run(({}, mask(2)), ({}, mask(3, 0.2)), ({}, mask(4)))
    comparison = compare(a, b)
    assert [pair.robust_b for pair in comparison.pairs] == [mask(2).mean(), mask(3, 0.2).mean()]
    assert len(comparison.only_in_b) == 1
    assert comparison.tests == 2
    assert comparison.adjusted == holm([pair.p for pair in comparison.pairs])


def test_a_pair_has_the_flags_of_its_records():
    rows = ({"attack": "a", "flags": [FLAG]}, {"attack": "b", "flags": [FLAG, {"name": "weak-attack", "why": ""}]})
    comparison = compare(
        run((rows[0], mask(0)), (rows[1], mask(1))), run(({"attack": "a"}, mask(0)), ({"attack": "b"}, mask(1)))
    )
    assert [pair.flags_a for pair in comparison.pairs] == [("flat-gradients",), *[("flat-gradients", "weak-attack")] * 2]
    assert {pair.flags_b for pair in comparison.pairs} == {()}


def test_the_worst_case_combines_several_seeds():
    rows = [({"seed": seed}, mask(seed)) for seed in (3, 4)]
    pairs = compare(run(*rows), run(*rows)).pairs
    assert [pair.seed for pair in pairs] == [3, 4, None]
    assert pairs[2].attacks == ("pgd (misclassify)", "pgd (misclassify)")


# Refusals


def test_runs_that_cannot_be_compared_are_refused_with_the_reason():
    a = run(({}, mask(0)), path="/runs/a")
    for b, words in (
        (run(({"data_hash": "d1"}, mask(0))), ("data_hash", "'d1'", "'d0'", "same data")),
        (run(({}, mask(0, n=N + 1))), ("n 41", "40")),
        (run(({}, mask(0)), schema=2), ("schema 2", "has 1", "same version")),
        (run(({"threat": "l2:1"}, mask(0))), ("no record in common", "l2:1", "linf:0.1", "PGD()", "same plan")),
        (run(({"data_hash": None}, mask(0))), ("without data_hash", "run it again")),
        (run(({"n": N + 1}, mask(0))), ("b='/runs/x' is not finished", "40 of 41", "finish it")),
        (run(), ("b='/runs/x' is not finished", "0 of 0")),
    ):
        message = refused(a, b)
        assert all(word in message for word in (*words, "/runs/x")), message
    assert "a='/runs/x' is not finished" in refused(run(), a)
    unfinished = Run(Path("half"), a.results, ())
    assert "b='half' is not finished: 0 of 40" in refused(a, unfinished)


def test_different_offsets_are_refused_where_both_runs_state_one():
    runs = [run(({}, mask(0)), **more) for more in ({}, {"data": {"offset": 0}}, {"data": {"offset": 7}}, {"data": {}})]
    assert "offset 7" in refused(runs[1], runs[2])
    for one, other in itertools.combinations(runs, 2):
        if (one, other) != (runs[1], runs[2]):
            assert compare(one, other).pairs


def test_the_error_names_only_the_first_of_many_records():
    a = run(*[({"seed": seed}, mask(0)) for seed in range(9)])
    message = refused(a, run(({"seed": 10}, mask(0))))
    assert "seed 0" in message
    assert "and 6 more" in message
    assert "seed 8" not in message


# The table and the JSON


def test_p_is_adjusted_over_all_tests_and_a_single_attack_is_tested_once():
    rows = [({"threat": threat}, mask(i)) for i, threat in enumerate(("l2:1", "l2:2", "l2:3"))]
    comparison = compare(run(*rows), run(*[(row, mask(i + 5, 0.2)) for i, (row, _) in enumerate(rows)]))
    assert (len(comparison.pairs), comparison.tests) == (6, 3)
    assert comparison.adjusted == 2 * holm([pair.p for pair in comparison.pairs[:3]])
    assert "3 tests were made" in " ".join(shown(comparison).split())
    two_attacks = compare(*[run(({}, mask(i)), ({"attack": "b"}, mask(i + 1))) for i in (0, 8)])
    assert (len(two_attacks.pairs), two_attacks.tests) == (3, 3)
    assert two_attacks.adjusted == holm([pair.p for pair in two_attacks.pairs])
    single = shown(compare(run(({}, mask(0))), run(({}, mask(1)))))
    assert "One test was made" in single
    assert "worst case" not in single


def test_p_and_adjusted_p_are_shown():
    rows = [({"attack": x}, [i < k for i in range(N)]) for x, k in (("a", 6), ("b", 5))]
    comparison = compare(run(*rows), run(*[(row, [False] * N) for row, _ in rows]))
    lines = [line.split()[-2:] for line in shown(comparison).splitlines() if " to " in line and "%" in line]
    assert lines == [["0.0312", "0.0938"], ["0.0625", "0.1250"], ["0.0625", "0.1250"]]


def test_the_table_fits_80_columns_without_cutting_a_figure():
    n = 20_000
    rows = [
        ({"attack": x, "flags": [FLAG] * (x == "a")}, mask(i, n=n)) for i, x in enumerate(("a", "pgd:steps=1000,reach=2.5"))
    ]
    comparison = compare(
        run(*rows, path="/runs/old"), run(*[(r | {"flags": []}, mask(9 + i, 0.1, n)) for i, (r, _) in enumerate(rows)])
    )
    text = shown(comparison)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    lines = [line for line in text.splitlines() if " to " in line and "%" in line]
    for pair, adjusted, line in zip(comparison.pairs, comparison.adjusted, lines, strict=True):
        for figure in (
            f"{pair.robust_a:.1%}",
            f"{pair.robust_b:.1%}",
            f"{100 * pair.low:+.1f} to {100 * pair.high:+.1f}",
            f"{pair.only_a:,}",
            f"{pair.only_b:,}",
            "<0.0001",
        ):
            assert f" {figure} " in f" {line} "
        assert adjusted < 1e-4
    wide = [line for line in shown(comparison, 120).splitlines() if " to " in line and "%" in line]
    assert [" !" in line for line in wide] == [True, False, True]
    assert text.count("! flat-gradients in A (a, linf:0.1)") == text.count("! flat") == 1
    assert "A: /runs/old\nB: /runs/x" in text


def test_the_table_lists_records_without_a_counterpart_and_names_seeds():
    rows = ({"seed": 1}, {"seed": 2}, {"threat": "l2:9"})
    comparison = compare(run(*[(row, mask(0)) for row in rows]), run(*[(row, mask(1)) for row in rows[:2]]))
    text = shown(comparison, 120)
    assert f"only in A, not compared: {label(RECORD | rows[2])}" in text
    assert "only in B" not in text.split("tests were made")[1]
    assert "pgd, seed 1 " in text
    assert "pgd, seed 2 " in text
    assert "worst case" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_printed_verbatim(name):
    changed = dict.fromkeys(("model", "data", "threat", "attack", "goal", "recipe", "defence"), name)
    flags = {"flags": [{"name": name, "why": name}]}
    a, b = run((changed | flags, mask(0)), ({"seed": 5}, mask(0))), run((changed, mask(1)), path=f"/runs/{name}")
    comparison = compare(a, b)
    text = shown(comparison, 250)
    if "\n" not in name:
        assert f"{name} behind {name}, {name}: 40 images of {name}" in text
        assert f"{name} → {name} !" in text
        assert f"! {name} in A ({name} → {name}, {name})" in text
        assert f"B: /runs/{name}" in text
    parsed = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert parsed["pairs"][0]["model_a"] == name
    assert parsed["b"] == f"/runs/{name}"
    refused(a, run((changed | {"seed": 7}, mask(0)), path=f"/runs/{name}"))


def test_the_json_has_the_figures_of_the_table():
    rows = ({}, {"attack": "b", "flags": [FLAG]}, {"threat": "l2:9"})
    comparison = compare(run(*[(row, mask(i)) for i, row in enumerate(rows)]), run(*[(row, mask(8)) for row in rows[:2]]))
    content = as_json(comparison)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert (content["a"], content["tests"], content["only_in_a"], content["only_in_b"]) == (
        "/runs/x",
        3,
        [label(RECORD | rows[2])],
        [],
    )
    assert len(content["pairs"]) == 3
    for row, pair, p in zip(content["pairs"], comparison.pairs, comparison.adjusted, strict=True):
        assert row["p_holm"] == p
        assert (row["p"], row["low"], row["high"], row["only_a"]) == (pair.p, pair.low, pair.high, pair.only_a)
        assert (row["robust_a"], row["robust_b"], row["difference"]) == (pair.robust_a, pair.robust_b, pair.difference)
        assert (row["attacks"], row["flags_a"]) == (list(pair.attacks), list(pair.flags_a))


# Stage by stage


def staged(*names):
    return {"stages": [{"name": name, "forwards": 1, "backwards": 1, "solved": 0} for name in names]}


A_STAGES = ["clean", "descent", "", "descent", "patches", "", "clean", "patches"]
B_STAGES = ["clean", "patches", "", "descent", "", "refine", "descent", "patches"]


def compared(
    a_names=("clean", "first-pass", "descent", "patches"), b_names=("clean", "descent", "refine", "patches"), attack="standard"
):
    a = run(({"attack": attack} | staged(*a_names), [not name for name in A_STAGES]), ({"threat": "l2:1"}, mask(0, n=8)))
    b = run(({"threat": "l2:1"}, mask(1, n=8)), ({"attack": attack} | staged(*b_names), [not name for name in B_STAGES]))
    of_a, of_b = (np.array(A_STAGES), np.array([""] * 8)), (np.array([""] * 8), np.array(B_STAGES))
    return compare(a, b, solved=(of_a, of_b))


def test_stages_are_compared_on_the_same_images():
    pair = compared().pairs[0]
    counts = {stage.name: (stage.a, stage.b, stage.both) for stage in pair.stages}
    by_hand = {
        name: (A_STAGES.count(name), B_STAGES.count(name), sum(x == y == name for x, y in zip(A_STAGES, B_STAGES, strict=True)))
        for name in ("clean", "first-pass", "descent", "patches", "refine")
    }
    assert counts == by_hand
    assert counts["clean"] == (2, 1, 1)
    assert [stage.name for stage in pair.stages] == [
        "clean",
        "first-pass",
        "descent",
        "patches",
        "refine",
    ]  # in the order of A, then of B
    assert [pair.stages for pair in compared().pairs[1:]] == [()] * 3  # no stages were recorded; the worst case has none
    assert sum(stage.a for stage in pair.stages) == pair.n - pair.only_a - pair.both


def test_stages_are_shown_for_attacks_with_their_own_stages():
    text = " ".join(shown(compared(), 250).split())
    counts = "clean 2 / 1 (1 in both), descent 2 / 2 (1 in both), patches 2 / 2 (1 in both), refine 0 / 1 (0 in both)"
    assert f"solved by stage, A / B (standard): {counts}" in text
    assert "solved by stage" not in shown(compared(("clean", "attack"), ("clean", "attack")))
    row = json.loads(json.dumps(as_json(compared())))["pairs"][0]
    assert row["stages"][2] == {"name": "descent", "a": 2, "b": 2, "both": 1}
    assert as_json(compare(run(({}, mask(0))), run(({}, mask(1)))))["pairs"][0]["stages"] == []


@pytest.mark.slow
def test_the_solving_stages_are_read_from_the_folder_of_a_run(tmp_path):
    cases = tuple(
        Case("zoo:digits-mlp", threat, attack) for threat, attack in (("linf:0.05", "fgsm"), ("linf:0.1", "standard"))
    )
    bench.run(Plan(cases, "digits", limit=50, block=20), out=tmp_path / "a")
    saved = past.read(tmp_path / "a")
    names, read_again = solvers(saved), solvers(past.read(tmp_path / "a"))
    for record, robust, of in zip(saved.results["records"], saved.robust, names, strict=True):
        assert len(of) == 50
        assert np.array_equal(of == "", robust)  # no stage solved a robust image
        assert {stage["name"]: stage["solved"] for stage in record["stages"] if stage["solved"]} == {
            str(name): int((of == name).sum()) for name in set(of.tolist()) - {""}
        }
    pairs = compare(saved, saved, solved=(names, read_again)).pairs
    assert all(stage.a == stage.b == stage.both for pair in pairs for stage in pair.stages)
    assert len([stage for stage in pairs[1].stages if stage.a]) >= 2
    file = next((tmp_path / "a" / "examples" / "case-01").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArgumentError, match="is not a block of a run"):
        solvers(saved)


def test_the_command_compares_stages(tmp_path, capsys):
    for seed, name in ((0, "a"), (0, "b")):
        plan = Plan((Case("zoo:digits-mlp", "linf:0.05", "pgd:steps=2"),), "digits", limit=8, seed=seed)
        bench.run(plan, out=tmp_path / name)
    compare_command(tmp_path / "a", tmp_path / "b", "json")
    (first, _) = json.loads(capsys.readouterr().out)["pairs"]
    assert {"name", "a", "b", "both"} == set(first["stages"][0])
    assert sum(stage["a"] for stage in first["stages"]) == 8 - first["only_a"] - first["both"]


def test_the_table_explains_its_interval():
    text = " ".join(shown(compare(run(({}, mask(0))), run(({}, mask(1))))).split())
    assert "robust accuracy, an upper bound on robustness" in text
    assert "interval of the difference over the choice of images" in text
