"""Gates pass and fail exactly at the margin; flagged and missing measurements never pass."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.bench.comparison.gates import Verdict, fail_if_worse, fail_under
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.record import worst_case
from robustkit.errors import ArgumentError

RECORD = {
    "model": "m",
    "data": "digits",
    "defence": None,
    "goal": "misclassify",
    "threat": "linf:0.1",
    "attack": "pgd",
    "recipe": "PGD()",
    "seed": 0,
    "clean_accuracy": 1.0,
    "flags": [],
    "notes": [],
    "data_hash": "d0",
}
FLAG = {"name": "flat-gradients", "why": "no signal"}


def run(*rows, path="/runs/x"):
    """A run of records, each given by its differences from RECORD and its mask of robust images."""
    masks = [np.array(right, bool) for _, right in rows]
    records = [
        RECORD | row | {"n": len(m), "robust_accuracy": float(m.mean())} for (row, _), m in zip(rows, masks, strict=True)
    ]
    entries = worst_case(list(zip(records, masks, strict=True)))
    return Run(Path(path), {"schema": 1, "records": records, "worst_case": entries}, tuple(masks))


def right(k, n):
    return [i < k for i in range(n)]


def passed(verdicts):
    return [verdict.passed for verdict in verdicts]


# fail_under


@pytest.mark.parametrize(
    ("k", "share", "expected"), [(29, 0.29, True), (28, 0.29, False), (0, 0, True), (100, 1, True), (99, 1, False)]
)
def test_a_robust_accuracy_equal_to_the_share_passes(k, share, expected):
    (verdict,) = fail_under(run(({}, right(k, 100))).results, share)
    assert verdict.passed is expected
    assert f"robust accuracy {k}.0% on 100 images, {'at least' if expected else 'under'} {share:.1%}" == verdict.why
    assert verdict.name == f"m, linf:0.1: robust accuracy at least {share:.1%}"


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(0, 1000))
def test_rounding_never_decides_about_a_share(counts, thousandths):
    k, n = counts
    (verdict,) = fail_under(run(({}, right(k, n))).results, thousandths / 1000)
    assert verdict.passed == (1000 * k >= thousandths * n)


def test_the_worst_case_of_each_threat_and_model_is_gated():
    a, b = [True, True, False, True], [False, True, True, True]
    it = run(
        ({}, a),
        ({"attack": "fgsm", "goal": "least-likely"}, b),
        ({"threat": "l2:1"}, a),
        ({"model": "k", "defence": "jpeg"}, b),
    )
    verdicts = fail_under(it.results, 0.6)
    assert passed(verdicts) == [False, True, True]
    assert [verdict.name.split(":")[0] for verdict in verdicts] == ["m, linf", "m, l2", "k behind jpeg, linf"]
    assert "50.0% on 4 images, under 60.0%" in verdicts[0].why


@pytest.mark.parametrize("where", [{}, {"goal": "least-likely", "attack": "fgsm"}])
def test_a_flagged_figure_fails(where):
    it = run(({}, right(9, 9)), ({"flags": [FLAG]} | where, right(9, 9)), ({"threat": "l2:1"}, right(9, 9)))
    flagged, clean = fail_under(it.results, 0)
    assert (flagged.passed, clean.passed) == (False, True)
    assert "flat-gradients" in flagged.why
    assert "do not believe it" in flagged.why
    assert "flat" not in clean.why


@pytest.mark.parametrize("field", ["model", "data", "defence", "threat"])
def test_a_flag_concerns_its_own_group_alone(field):
    it = run(({}, right(9, 9)), ({field: "other", "flags": [FLAG]}, right(9, 9)))
    assert passed(fail_under(it.results, 0.5)) == [True, False]


def test_robust_accuracy_under_other_goals_is_not_gated():
    other = ({"goal": "least-likely", "threat": "l2:1", "attack": "odd (misclassify)"}, right(5, 5))
    assert len(fail_under(run(({}, right(5, 5)), other).results, 0.5)) == 1
    with pytest.raises(
        ArgumentError, match=r"share=0.5: a gate needs an attack with goal misclassify.*'least-likely'.*add such an attack"
    ):
        fail_under(run(other).results, 0.5)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (90, "90 % is 0.9"),
        (1.5, "1.5 % is 0.015"),
        (-0.1, "0.9 for 90 %"),
        (101, "0.9 for 90 %"),
        (float("nan"), "share from 0 to 1"),
    ],
)
def test_an_invalid_share_is_refused(value, words):
    it = run(({}, right(5, 5)))
    for name, gate in (("share", lambda: fail_under(it.results, value)), ("margin", lambda: fail_if_worse(it, it, value))):
        with pytest.raises(ArgumentError, match=f"^{name}={value:g} must be") as error:
            gate()
        assert words in str(error.value)


# fail_if_worse


@pytest.mark.parametrize(
    ("lost", "won", "n", "margin", "expected"),
    [
        (3, 0, 30, 0.1, True),
        (4, 0, 30, 0.1, False),
        (29, 0, 100, 0.29, True),
        (30, 0, 100, 0.29, False),
        (7, 0, 100, 0.07, True),
        (5, 5, 40, 0, True),
        (5, 4, 40, 0, False),
        (4, 9, 40, 0, True),
        (10, 0, 10, 1, True),
        (1, 0, 100_000, 1e-5, True),
        (57, 0, 100, 0.57, True),
        (58, 0, 100, 0.58, True),
    ],
)
def test_a_fall_of_exactly_the_margin_passes(lost, won, n, margin, expected):
    before, after = np.zeros(n, bool), np.zeros(n, bool)
    before[:lost], after[lost : lost + won] = True, True
    (verdict,) = fail_if_worse(run(({}, after)), run(({}, before), path="/runs/old"), margin)
    assert verdict.passed is expected
    assert f"{lost:,} of {n:,} images lost, {won} won, {'at most' if expected else 'more than'} " in verdict.why
    assert verdict.name.startswith("m, linf:0.1: robust accuracy down by at most ")
    assert float(verdict.name.split()[-2]) == pytest.approx(100 * margin)
    assert verdict.name.endswith(" points")


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.integers(0, 1000))
def test_rounding_never_decides_about_a_margin(counts, thousandths):
    lost, n = counts
    (verdict,) = fail_if_worse(run(({}, right(0, n))), run(({}, right(lost, n))), thousandths / 1000)
    assert verdict.passed == (1000 * lost <= thousandths * n)


def test_the_worst_cases_of_both_runs_are_compared():
    before = run(({}, right(8, 10)), ({"attack": "fgsm"}, right(9, 10)), path="/runs/old")
    now = run(({"model": "new"}, right(9, 10)), ({"attack": "fgsm", "model": "new"}, right(5, 10)))
    (verdict,) = fail_if_worse(now, before, 0.1)
    assert not verdict.passed
    assert verdict.name.startswith("new, linf:0.1")
    assert (
        "80.0% in the baseline (m), 50.0% now: 3 of 10 images lost, 0 won, more than 10.0 points down, p = 0.25" in verdict.why
    )
    (back,) = fail_if_worse(before, now, 0)
    assert back.passed
    assert "50.0% in the baseline (new), 80.0% now" in back.why


def test_a_new_flag_fails_and_an_old_one_is_reported():
    clean, flagged = run(({}, right(5, 10))), run(({"flags": [FLAG]}, right(5, 10)))
    more = run(({"flags": [FLAG, {"name": "masked", "why": ""}]}, right(9, 10)))
    (new,), (gone,), (old,), (both,) = (
        fail_if_worse(*two, 0.5) for two in ((flagged, clean), (clean, flagged), (flagged, flagged), (more, flagged))
    )
    assert (new.passed, gone.passed, old.passed, both.passed) == (False, True, True, False)
    assert "new flag, do not believe it: flat-gradients" in new.why
    assert "flag" not in gone.why
    assert "flagged like the baseline: flat-gradients" in old.why
    assert "do not believe it: masked; flagged like the baseline: flat-gradients" in both.why


def test_a_missing_measurement_fails_and_a_new_one_is_not_gated():
    everything = ({}, right(5, 5)), ({"threat": "l2:1"}, right(5, 5)), ({"threat": "l1:1"}, right(5, 5))
    kept, missing = fail_if_worse(run(everything[0], everything[2]), run(*everything[:2]), 0.5)
    assert (kept.passed, missing.passed) == (True, False)
    assert missing.name.startswith("m, l2:1: ")
    assert "make a new baseline" in missing.why
    added = fail_if_worse(run(*everything, ({"threat": "l2:1", "attack": "fgsm"}, right(5, 5))), run(*everything), 0.5)
    assert passed(added) == [True, False, True]  # other attacks give another figure


def test_verdicts_are_in_the_order_of_the_baseline():
    rows = [({"model": m, "threat": t}, right(5, 5)) for m, t in (("b", "l2:1"), ("a", "l2:1"), ("b", "linf:1"))]
    names = [verdict.name.split(":")[0] for verdict in fail_if_worse(run(*rows[::-1]), run(*rows), 0)]
    assert names == ["b, l2", "a, l2", "b, linf"]


def test_runs_without_a_comparable_group_are_refused():
    targeted = ({"goal": "least-likely", "attack": "odd (misclassify)"}, right(5, 5))
    for now, before in (
        (run(targeted), run(targeted)),
        (run(({}, right(5, 5)), ({"attack": "fgsm"}, right(5, 5))), run(({}, right(5, 5)))),
    ):
        with pytest.raises(
            ArgumentError, match=r"^baseline='/runs/x' and now='/runs/x' have no .* run both with the same plan$"
        ):
            fail_if_worse(now, before, 0.5)
    with pytest.raises(ArgumentError, match=r"^the baseline is a, the run to test is b: .* data_hash 'd1'"):
        fail_if_worse(run(({"data_hash": "d1"}, right(5, 5))), run(({}, right(5, 5))), 0.5)


@pytest.mark.parametrize("name", ["x\ny", "[/]", "\udcff", "a\r\n\x85b"])
def test_name_and_reason_of_a_verdict_are_one_line_each(name):
    row = dict.fromkeys(("model", "threat", "defence", "attack", "data"), name)
    it = run((row | {"flags": [{"name": name, "why": name}]}, right(5, 5)))
    verdicts = [*fail_under(it.results, 0.5), *fail_if_worse(it, it, 0.5)]
    for verdict in verdicts:
        assert isinstance(verdict, Verdict)
        assert len(verdict.name.splitlines()) == len(verdict.why.splitlines()) == 1
        assert name.split()[0] in verdict.name
        assert name.split()[-1] in verdict.why
