"""The words of the command line: numbers exact, every name with every field, and clear refusals."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import FGSM, L1, L2, MIFGSM, PGD, ClassifyAs, Linf, Misclassify, Pixels
from robustkit.bench import specs
from robustkit.errors import ArgumentError

THREE = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])


@given(st.integers(0, 10**18), st.integers(1, 10**18))
def test_fractions_are_rounded_once(above, below):
    assert specs.number(f"{above}/{below}", "eps") == above / below  # Python divides integers exactly and rounds once


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000))
def test_decimals_are_rounded_once(value):
    assert specs.number(f"{value}", "eps") == float(Fraction(value))


@pytest.mark.parametrize("text", ["", " ", "x", "1/0", "1/", "/2", "nan", "inf", "-inf", "1e400", "1/2/3", "0x10", "8,255"])
def test_what_is_no_number_is_refused_with_its_name_and_value(text):
    with pytest.raises(ArgumentError, match="a number or a fraction such as 8/255") as caught:
        specs.number(text, "the name")
    assert f"the name={text!r}" in str(caught.value)


def test_a_number_of_many_digits_costs_nothing():
    for text in ("1e999999999", "9" * 100_000 + "/3"):
        with pytest.raises(ArgumentError):
            specs.number(text, "eps")
    assert specs.number("1e-999999999", "eps") == 0


@pytest.mark.parametrize(
    ("spec", "threat"),
    [
        ("linf:8/255", Linf(8 / 255)), ("linf:0.3", Linf(0.3)), ("linf: 1/10", Linf(0.1)), ("l2:0.5", L2(0.5)),
        ("l2:1e1", L2(10.0)), ("l1:12", L1(12.0)), ("pixels:1", Pixels(1)), ("pixels:10/2", Pixels(5)),
    ],
)  # fmt: skip
def test_threats(spec, threat):
    found = specs.threat(spec)
    assert found == threat
    assert type(found.eps) is type(threat.eps)
    assert found.bounds == (0.0, 1.0)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("l3:1", "'l3:1' does not exist; write one of linf:8/255, l2:0.5, l1:12, pixels:1"), ("linf", "'linf' does not exist"),
        ("LINF:0.1", "does not exist"), ("", "does not exist"), ("linf:", "eps='' must be a number"),
        ("linf:8", "'linf:8'.*divide by 255"), ("linf:0", "'linf:0'.*above 0"), ("l2:-1", "'l2:-1'.*above 0"),
        ("l2:1/0", "eps='1/0'"), ("pixels:1.5", "'pixels:1.5'.*whole number"), ("pixels:0", "'pixels:0'.*above 0"),
    ],
)  # fmt: skip
def test_threats_that_are_none(spec, told):
    with pytest.raises(ArgumentError, match=f"threat .*{told}"):
        specs.threat(spec)


@pytest.mark.parametrize(
    ("spec", "attack"),
    [
        ("fgsm", FGSM()), ("pgd", PGD()), ("mifgsm", MIFGSM()), ("mifgsm:decay=0,steps=3", MIFGSM(steps=3, decay=0.0)),
        ("ifgsm", PGD(steps=10, reach=2.0, random_start=False)), ("ifgsm:steps=7", PGD(7, 2.0, random_start=False)),
        ("pgd:steps=20,reach=3,step_size=2/255,random_start=false", PGD(20, 3.0, 2 / 255, False)),
        ("pgd:random_start=true", PGD()), ("pgd:steps=4e1", PGD(40)), ("pgd:", PGD()),
    ],
)  # fmt: skip
def test_attacks(spec, attack):
    assert specs.attack(spec) == attack


@pytest.mark.parametrize("name", specs.attack_names())
def test_every_attack_can_be_written_out_in_full_and_read_back(name):
    attack = specs.attack(name)
    values = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    words = [f"{key}={str(value).lower()}" for key, value in values.items() if value is not None]
    assert specs.attack(":".join([name, ",".join(words)])) == attack
    for key, value in values.items():
        other = (not value) if isinstance(value, bool) else (value or 0) + 1
        changed = specs.attack(f"{name}:{key}={str(other).lower()}")
        assert changed == dataclasses.replace(attack, **{key: other})
        assert type(getattr(changed, key)) in (type(value), float)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nope", "'nope' does not exist; there are fgsm, ifgsm, mifgsm, pgd"), ("", "'' does not exist"),
        ("PGD", "'PGD' does not exist"), ("fgsm:steps=3", "'steps=3' is no field=value of fgsm; its fields: none"),
        ("pgd:nope=3", "'nope=3' is no field=value of pgd; its fields: steps, reach, step_size, random_start"),
        ("pgd:steps", "'steps' is no field=value"), ("pgd:steps=3,", "'' is no field=value"), ("pgd:=3", "'=3' is no"),
        ("pgd:steps=", "steps='' must be a number"), ("pgd:steps=2.5", "steps='2.5' must be a whole number"),
        ("pgd:steps=0", "'pgd:steps=0': steps=0 must be a whole number, at least 1"), ("pgd:steps=x", "steps='x'"),
        ("pgd:reach=0", "reach=0.0 must be a number above zero"), ("pgd:random_start=maybe", "='maybe' must be true or false"),
        ("pgd:random_start=1", "='1' must be true or false"), ("pgd:steps=1,steps=2", "steps is given twice"),
    ],
)  # fmt: skip
def test_attacks_that_are_none(spec, told):
    with pytest.raises(ArgumentError, match=f"attack .*{told}"):
        specs.attack(spec)


def test_goals_make_their_reference():
    y = torch.tensor([0, 2])
    aims = {name: specs.goal(name) for name in ("misclassify", "least-likely", "classify-as:2")}
    found = {name: (aim.goal, aim.ref(lambda x: THREE[: len(x)], THREE, y, 2).tolist()) for name, aim in aims.items()}
    assert found == {
        "misclassify": (Misclassify(), [0, 2]),
        "least-likely": (ClassifyAs(), [1, 2]),
        "classify-as:2": (ClassifyAs(), [2, 2]),
    }
    assert [aim.wanted for aim in aims.values()] == [None, None, 2]


def test_the_least_likely_class_is_sought_in_small_batches():
    seen = []
    specs.goal("least-likely").ref(lambda x: seen.append(len(x)) or x, THREE.repeat(5, 1), THREE[:0], 3)
    assert seen == [3, 3, 3, 1]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "nope",
        "misclassify:3",
        "classify-as",
        "classify-as:",
        "classify-as:-1",
        "classify-as:1.0",
        f"classify-as:{'9' * 30}",
    ],
)
def test_goals_that_are_none(spec):
    with pytest.raises(ArgumentError, match="does not exist; write one of misclassify, least-likely, classify-as:K") as caught:
        specs.goal(spec)
    assert repr(spec) in str(caught.value)


def test_no_threat_that_can_be_written_is_not_finite():
    assert all(math.isfinite(specs.threat(spec).eps) for spec in ("linf:1", "l2:1e300", "l1:1e-300"))
