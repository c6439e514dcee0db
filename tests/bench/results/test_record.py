"""Records: intervals, medians, flags and notes, curves, and the keys and types of the schema."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import PGD, Linf, data, zoo
from robustkit._engine.ledger import Check, Message, Stage
from robustkit.attacks import FMN, DeepFool, UniversalPGD
from robustkit.bench import Case, Plan
from robustkit.bench.results.curves import GRID, against_cost, against_eps
from robustkit.bench.results.record import make_record, worst_case
from robustkit.bench.statistics.intervals import wilson
from robustkit.result import Result

# The required keys of a record in the schema of results.json, and their JSON types there.
KEYS = {
    "model": str,
    "data": str,
    "defence": (str, type(None)),
    "goal": str,
    "threat": str,
    "attack": str,
    "seed": int,
    "n": int,
    "clean_accuracy": float,
    "robust_accuracy": float,
    "success_rate": float,
    "low": float,
    "high": float,
    "median_size": (float, type(None)),
    "forwards": int,
    "backwards": int,
    "seconds": float,
    "access": str,
    "flags": list,
    "notes": list,
    "recipe": str,
    "model_hash": str,
    "data_hash": str,
    "against_cost": (list, type(None)),
    "against_eps": (list, type(None)),
    "stages": list,
    "checks": list,
}
CASE = Case("m", "linf:0.1", "pgd", "least-likely")
PLAN = Plan((CASE,), "digits", seed=4, expected_hashes={"digits": "def"})


def make(success, size, *, flat=0, flags=(), notes=(), correct=None, robust=None):
    n = len(success)
    ones = torch.ones(n, dtype=torch.int64)
    result = Result(
        torch.zeros(n, 0),
        torch.tensor(success),
        ones.float(),
        torch.tensor(size, dtype=torch.float64),
        3 * ones,
        2 * ones,
        flat * ones,
        tuple(flags),
        tuple(notes),
    )
    all_images = np.ones(n, dtype=bool)
    return make_record(
        CASE,
        PLAN,
        attack=PGD(steps=5),
        result=result,
        correct=all_images if correct is None else np.array(correct),
        robust=all_images if robust is None else np.array(robust),
        seconds=1.5,
        model_hash="abc",
    )


def test_a_record_has_the_keys_and_types_of_the_schema():
    flags, notes = [Message("a-flag", "for a reason")], [Message("a-note", "as it is")]
    record = make([True, False], [0.1, 0.2], flags=flags, notes=notes, correct=[True, False], robust=[False, False])
    assert {key: record[key] for key in KEYS} == record
    for key, kind in KEYS.items():
        assert isinstance(record[key], kind), key
        assert not isinstance(record[key], bool), key
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    case = {"model": "m", "data": "digits", "threat": "linf:0.1", "attack": "pgd", "goal": "least-likely", "seed": 4}
    counted = {"n": 2, "clean_accuracy": 0.5, "robust_accuracy": 0.0, "success_rate": 0.5, "forwards": 6, "backwards": 4}
    given = {
        "model_hash": "abc",
        "data_hash": "def",
        "defence": None,
        "seconds": 1.5,
        "access": "white",
        "recipe": repr(PGD(steps=5)),
    }
    assert record == record | case | counted | given
    assert record["flags"] == [{"name": "a-flag", "why": "for a reason"}]
    assert record["notes"] == [{"name": "a-note", "why": "as it is"}]


@pytest.mark.parametrize(
    ("success", "size", "median"),
    [
        ([True, False, True, True], [3.0, 100.0, 0.0, 1.0], 1.0),
        ([True, True], [1.0, 2.0], 1.5),
        ([False, True], [0.0, 7.0], 7.0),
        ([False, False], [1.0, 2.0], None),
    ],
)
def test_the_median_size_is_that_of_the_successes(success, size, median):
    assert make(success, size)["median_size"] == median


def test_rates_are_over_all_images():
    record = make([True, False, False, False], [0.0] * 4, correct=[True, True, False, True], robust=[False, True, False, True])
    assert (record["clean_accuracy"], record["robust_accuracy"], record["success_rate"]) == (0.75, 0.5, 0.25)
    assert (record["low"], record["high"]) == wilson(2, 4)


def test_a_message_appears_once_with_the_number_of_further_ones():
    flags = [Message("a", "first"), Message("b", "only"), Message("a", "second"), Message("a", "third")]
    assert make([True], [0.1], flags=flags)["flags"] == [
        {"name": "a", "why": "first (and 2 more like it)"},
        {"name": "b", "why": "only"},
    ]


def test_gradients_without_signal_are_noted():
    assert make([True], [0.1])["notes"] == []
    block = Message("flat-gradients", "9 of 9 gradients in some block")
    record = make([True] * 3, [0.1] * 3, flat=1, flags=[block])  # true of a block, not of the whole case
    (note,) = record["notes"]
    assert record["flags"] == []
    assert note == {"name": "flat-gradients", "why": "50.0% of the gradient queries were zero or not finite, on 3 images"}


def test_flat_gradients_of_unsolved_images_are_a_flag_of_the_whole_case():
    record = make([True, False, False, False], [0.1] * 4, flat=2)
    assert record["notes"] == []
    (flag,) = record["flags"]
    assert flag["name"] == "flat-gradients"
    assert flag["why"].startswith("6 of 6 gradients of the unsolved examples")


def test_the_worst_case_is_robust_to_every_attack():
    rows = [
        ({"model": "m", "threat": "linf:0.1", "attack": "a", "goal": "misclassify"}, [1, 1, 0, 1]),
        ({"model": "m", "threat": "linf:0.1", "attack": "b", "goal": "least-likely"}, [0, 1, 1, 1]),
        ({"model": "m", "threat": "l2:1", "attack": "a", "goal": "misclassify"}, [1, 1, 1, 1]),
    ]
    cases = [(row | {"data": "d", "defence": None, "clean_accuracy": 1.0}, np.array(robust, bool)) for row, robust in rows]
    linf, l2 = worst_case(cases)
    assert (linf["threat"], linf["robust_accuracy"], linf["n"]) == ("linf:0.1", 0.5, 4)
    assert linf["attacks"] == ["a (misclassify)", "b (least-likely)"]
    assert (linf["low"], linf["high"]) == wilson(2, 4)
    assert (l2["robust_accuracy"], l2["attacks"]) == (1.0, ["a (misclassify)"])


# Curves


def with_costs(forwards, backwards, size=None):
    n = len(forwards)
    sizes = torch.zeros(n, dtype=torch.float64) if size is None else torch.tensor(size, dtype=torch.float64)
    counts = torch.tensor(forwards), torch.tensor(backwards)
    return Result(
        torch.zeros(n, 0), torch.zeros(n, dtype=torch.bool), torch.zeros(n), sizes, *counts, torch.zeros_like(counts[0])
    )


def test_the_curve_against_cost_by_hand():
    """Misclassified before; solved at cost 3 + 2 x 2 = 7; at 5; unsolved after 21; solved at 7."""
    result = with_costs([1, 3, 5, 7, 1], [0, 2, 0, 7, 3])
    curve = against_cost(result, np.array([0, 1, 1, 1, 1], bool), np.array([0, 0, 0, 1, 0], bool))
    assert curve == [[0.0, 0.8], [5.0, 0.6], [7.0, 0.2], [21.0, 0.2]]


@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 100), st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_every_point_of_a_curve_against_cost_is_exact(images):
    forwards, backwards, correct, unsolved = (list(column) for column in zip(*images, strict=True))
    robust = [a and b for a, b in zip(correct, unsolved, strict=True)]
    curve = against_cost(with_costs(forwards, backwards), np.array(correct), np.array(robust))
    for cost, share in curve:
        still = [a and (b or f + 2 * g > cost) for f, g, a, b in zip(forwards, backwards, correct, robust, strict=True)]
        assert share == sum(still) / len(images)
    assert [place for place, _ in curve] == sorted({place for place, _ in curve})
    assert (curve[0][0], curve[0][1], curve[-1][1]) == (0.0, sum(correct) / len(images), sum(robust) / len(images))
    steps = {f + 2 * g for f, g, a, b in zip(forwards, backwards, correct, robust, strict=True) if a and not b}
    assert (
        len(curve) == len({0, *steps, max(f + 2 * g for f, g, _, _ in images)})
        if len(steps) <= GRID
        else len(curve) <= GRID + 2
    )


@given(st.lists(st.tuples(st.floats(0, 0.3), st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_every_point_of_a_curve_against_eps_is_exact(images):
    size, correct, unsolved = (list(column) for column in zip(*images, strict=True))
    robust = [a and b for a, b in zip(correct, unsolved, strict=True)]
    curve = against_eps(with_costs([1] * len(size), [0] * len(size), size), np.array(correct), np.array(robust), 0.3)
    assert len(curve) == GRID + 1
    assert curve[0] == [0.0, sum(correct) / len(images)]
    assert curve[-1] == [0.3, sum(robust) / len(images)]
    for eps, share in curve[1:]:
        assert share == sum(a and (b or s > eps) for s, a, b in zip(size, correct, robust, strict=True)) / len(images)


def test_eps_is_an_integer_for_pixels_and_sizes_beyond_it_by_rounding_are_inside():
    correct, robust = np.array([1, 1, 1], bool), np.array([0, 0, 1], bool)
    curve = against_eps(with_costs([1] * 3, [0] * 3, [1.0, 3.0, 2.0]), correct, robust, 4.0, integers=True)
    assert curve == [[0.0, 1.0], [1.0, 2 / 3], [2.0, 2 / 3], [3.0, 1 / 3], [4.0, 1 / 3]]
    assert against_eps(with_costs([1] * 3, [0] * 3, [0.1, 0.3 + 1e-9, 0]), correct, robust, 0.3)[-1] == [0.3, 1 / 3]


def test_the_curve_of_a_minimum_norm_attack_agrees_with_attacks_at_fixed_eps():
    """FMN and PGD are different attacks, so single images may differ; on 100 digits they are a few images apart."""
    part, model = data.load("digits").part(limit=100), zoo.load("digits-mlp")
    with torch.no_grad():
        correct = (model(part.x).argmax(1) == part.y).numpy()
    result = FMN(steps=60)(model, part.x, part.y, threat=Linf(0.1), keep="smallest")
    curve = dict(against_eps(result, correct, correct & ~result.success.numpy(), 0.1))
    for eps in (0.02, 0.05, 0.08):
        (near,) = [share for place, share in curve.items() if abs(place - eps) < 1e-9]
        fixed = PGD()(model, part.x, part.y, threat=Linf(eps)).success.double().mean()
        assert near == pytest.approx(1 - float(fixed), abs=0.06)
        recount = FMN(steps=60)(model, part.x, part.y, threat=Linf(0.1), keep="smallest")
        assert near == 1 - float((recount.success & (recount.size <= eps)).double().mean())
    assert curve[0.0] - curve[0.1] > 0.4


def test_which_attacks_are_minimum_norm_attacks():
    assert FMN.minimum_norm
    assert DeepFool.minimum_norm
    assert not PGD.minimum_norm


def record_of(attack, goal="misclassify", threat="linf:0.2"):
    case = Case("m", threat, "a", goal)
    result = with_costs([3, 4], [1, 1], [0.1, 0.2])
    return make_record(
        case,
        PLAN,
        attack=attack,
        result=result,
        correct=np.array([True, True]),
        robust=np.array([False, True]),
        seconds=0.0,
        model_hash="",
    )


def test_a_record_has_the_curve_that_suits_its_attack():
    assert record_of(PGD())["against_cost"] == [[0.0, 1.0], [5.0, 0.5], [6.0, 0.5]]
    assert record_of(PGD())["against_eps"] is None
    smallest = record_of(FMN())
    assert smallest["against_cost"] is None  # it continues after its first success
    assert (len(smallest["against_eps"]), smallest["against_eps"][-1]) == (GRID + 1, [0.2, 0.5])
    assert [place for place, _ in record_of(FMN(), threat="pixels:3")["against_eps"]] == [0.0, 1.0, 2.0, 3.0]
    others = [
        (PGD(), {"goal": "least-likely"}),
        (FMN(), {"goal": "least-likely"}),
        (UniversalPGD(), {}),
        (FMN(), {"threat": "own"}),
    ]
    for record in (record_of(attack, **options) for attack, options in others):
        assert (record["against_cost"], record["against_eps"]) == (None, None)


def test_a_record_has_the_stages_and_checks():
    n = torch.ones(1, dtype=torch.int64)
    result = Result(
        torch.zeros(1, 0),
        n.bool(),
        n.float(),
        n.double(),
        n,
        n,
        n,
        stages=(Stage("clean", 5, 0, 2),),
        checks=(Check("unsteady-answers", 1, 9, 0.1),),
    )
    record = make_record(
        CASE, PLAN, attack=PGD(), result=result, correct=np.ones(1, bool), robust=np.zeros(1, bool), seconds=0.0, model_hash=""
    )
    assert record["stages"] == [{"name": "clean", "forwards": 5, "backwards": 0, "solved": 2}]
    assert record["checks"] == [{"name": "unsteady-answers", "hits": 1, "of": 9, "limit": 0.1}]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
