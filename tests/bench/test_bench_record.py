"""A record: its interval, its median, what it remarks, and the keys and types that others read."""

import json
import math

import numpy as np
import pytest
import torch

from robustkit import PGD
from robustkit.bench import Case, Plan
from robustkit.bench.record import make_record, together, wilson
from robustkit.ledger import Remark
from robustkit.result import Result

# The required keys of a record in the schema of results.json, and their JSON types there.
KEYS = {
    "model": str, "data": str, "defence": (str, type(None)), "goal": str, "threat": str, "attack": str, "seed": int, "n": int,
    "clean_accuracy": float, "robust_accuracy": float, "success_rate": float, "low": float, "high": float,
    "median_size": (float, type(None)), "forwards": int, "backwards": int, "seconds": float, "access": str, "flags": list,
    "notes": list, "recipe": str, "model_hash": str, "data_hash": str,
}  # fmt: skip
CASE = Case("m", "linf:0.1", "pgd", "least-likely")
PLAN = Plan((CASE,), "digits", seed=4, pins={"digits": "def"})


def made(success, size, *, flat=0, flags=(), notes=(), clean=None, robust=None):
    n = len(success)
    ones = torch.ones(n, dtype=torch.int64)
    result = Result(torch.zeros(n, 0), torch.tensor(success), ones.float(), torch.tensor(size, dtype=torch.float64),
                    3 * ones, 2 * ones, flat * ones, tuple(flags), tuple(notes))  # fmt: skip
    yes = np.ones(n, dtype=bool)
    return make_record(CASE, PLAN, attack=PGD(steps=5), result=result, clean=yes if clean is None else np.array(clean),
                       robust=yes if robust is None else np.array(robust), seconds=1.5, model_hash="abc")  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_the_interval_is_wilsons_closed_formula(n):
    z = 1.959963984540054
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        middle, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
        low, high = wilson(k, n)
        assert (low, high) == pytest.approx((middle - spread, middle + spread), abs=1e-12)
        assert 0 <= low <= k / n <= high <= 1


def test_a_record_holds_the_keys_of_the_schema_in_types_that_json_keeps():
    flags, notes = [Remark("alarm", "for a reason")], [Remark("fact", "as it is")]
    record = made([True, False], [0.1, 0.2], flags=flags, notes=notes, clean=[True, False], robust=[False, False])
    assert {key: record[key] for key in KEYS} == record
    for key, kind in KEYS.items():
        assert isinstance(record[key], kind), key
        assert not isinstance(record[key], bool), key
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    told = {"model": "m", "data": "digits", "threat": "linf:0.1", "attack": "pgd", "goal": "least-likely", "seed": 4}
    counted = {"n": 2, "clean_accuracy": 0.5, "robust_accuracy": 0.0, "success_rate": 0.5, "forwards": 6, "backwards": 4}
    given = {
        "model_hash": "abc",
        "data_hash": "def",
        "defence": None,
        "seconds": 1.5,
        "access": "white",
        "recipe": repr(PGD(steps=5)),
    }
    assert record == record | told | counted | given
    assert record["flags"] == [{"name": "alarm", "why": "for a reason"}]
    assert record["notes"] == [{"name": "fact", "why": "as it is"}]


@pytest.mark.parametrize(
    ("success", "size", "median"),
    [
        ([True, False, True, True], [3.0, 100.0, 0.0, 1.0], 1.0), ([True, True], [1.0, 2.0], 1.5),
        ([False, True], [0.0, 7.0], 7.0), ([False, False], [1.0, 2.0], None),
    ],
)  # fmt: skip
def test_the_median_size_is_that_of_the_successes(success, size, median):
    assert made(success, size)["median_size"] == median


def test_rates_are_over_all_images():
    record = made([True, False, False, False], [0.0] * 4, clean=[True, True, False, True], robust=[False, True, False, True])
    assert (record["clean_accuracy"], record["robust_accuracy"], record["success_rate"]) == (0.75, 0.5, 0.25)
    assert (record["low"], record["high"]) == wilson(2, 4)


def test_a_remark_is_told_once_with_how_often_it_came_back():
    flags = [Remark("a", "first"), Remark("b", "only"), Remark("a", "second"), Remark("a", "third")]
    assert made([True], [0.1], flags=flags)["flags"] == [
        {"name": "a", "why": "first (and 2 more like it)"},
        {"name": "b", "why": "only"},
    ]


def test_gradients_without_signal_are_told():
    assert made([True], [0.1])["notes"] == []
    block = Remark("flat-gradients", "9 of 9 gradients in some block")
    broken = made([True] * 3, [0.1] * 3, flat=1, flags=[block])  # told of a block, not true of the whole
    (note,) = broken["notes"]
    assert broken["flags"] == []
    assert note == {"name": "flat-gradients", "why": "50.0% of the gradient queries were zero or not finite, on 3 images"}


def test_flat_gradients_of_unbroken_images_are_a_flag_of_the_whole_case():
    record = made([True, False, False, False], [0.1] * 4, flat=2)
    assert record["notes"] == []
    (flag,) = record["flags"]
    assert flag["name"] == "flat-gradients"
    assert flag["why"].startswith("6 of 6 gradients of the unbroken examples")


def test_all_attacks_together_leave_what_each_of_them_leaves():
    rows = [
        ({"model": "m", "threat": "linf:0.1", "attack": "a", "goal": "misclassify"}, [1, 1, 0, 1]),
        ({"model": "m", "threat": "linf:0.1", "attack": "b", "goal": "least-likely"}, [0, 1, 1, 1]),
        ({"model": "m", "threat": "l2:1", "attack": "a", "goal": "misclassify"}, [1, 1, 1, 1]),
    ]
    given = [(row | {"data": "d", "defence": None, "clean_accuracy": 1.0}, np.array(robust, bool)) for row, robust in rows]
    linf, l2 = together(given)
    assert (linf["threat"], linf["robust_accuracy"], linf["n"]) == ("linf:0.1", 0.5, 4)
    assert linf["attacks"] == ["a (misclassify)", "b (least-likely)"]
    assert (linf["low"], linf["high"]) == wilson(2, 4)
    assert (l2["robust_accuracy"], l2["attacks"]) == (1.0, ["a (misclassify)"])
