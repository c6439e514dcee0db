"""Specs of the command line: exact numbers, every attack with every field, and clear errors."""

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import ClassVar, Literal, Optional, get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import FGSM, L1, L2, MIFGSM, PGD, ClassifyAs, Linf, Misclassify, Pixels, data
from robustkit import evaluate as evaluate_
from robustkit.attack import Attack
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import Case, Plan
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

THREE = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]])


@given(st.integers(0, 10**18), st.integers(1, 10**18))
def test_fractions_are_rounded_once(above, below):
    assert specs.number(f"{above}/{below}", "eps") == above / below  # Python divides integers exactly and rounds once


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-1000, max_value=1000))
def test_decimals_are_rounded_once(value):
    assert specs.number(f"{value}", "eps") == float(Fraction(value))


@pytest.mark.parametrize("text", ["", " ", "x", "1/0", "1/", "/2", "nan", "inf", "-inf", "1e400", "1/2/3", "0x10", "8,255"])
def test_invalid_numbers_are_refused_with_name_and_value(text):
    with pytest.raises(ArgumentError, match="a number or a fraction such as 8/255") as caught:
        specs.number(text, "the name")
    assert f"the name={text!r}" in str(caught.value)


def test_numbers_with_huge_exponents_are_cheap():
    for text in ("1e999999999", "9" * 100_000 + "/3"):
        with pytest.raises(ArgumentError):
            specs.number(text, "eps")
    assert specs.number("1e-999999999", "eps") == 0


@pytest.mark.parametrize(
    ("spec", "threat"),
    [
        ("linf:8/255", Linf(8 / 255)),
        ("linf:0.3", Linf(0.3)),
        ("linf: 1/10", Linf(0.1)),
        ("l2:0.5", L2(0.5)),
        ("l2:1e1", L2(10.0)),
        ("l1:12", L1(12.0)),
        ("pixels:1", Pixels(1)),
        ("pixels:10/2", Pixels(5)),
    ],
)
def test_threats(spec, threat):
    parsed = specs.threat(spec)
    assert parsed == threat
    assert type(parsed.eps) is type(threat.eps)
    assert parsed.bounds == (0.0, 1.0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("l3:1", "'l3:1' does not exist; write one of linf:8/255, l2:0.5, l1:12, pixels:1"),
        ("linf", "'linf' does not exist"),
        ("LINF:0.1", "does not exist"),
        ("", "does not exist"),
        ("linf:", "eps='' must be a number"),
        ("linf:8", "'linf:8'.*divide by 255"),
        ("linf:0", "'linf:0'.*above 0"),
        ("l2:-1", "'l2:-1'.*above 0"),
        ("l2:1/0", "eps='1/0'"),
        ("pixels:1.5", "'pixels:1.5'.*whole number"),
        ("pixels:0", "'pixels:0'.*above 0"),
    ],
)
def test_invalid_threats_are_refused(spec, message):
    with pytest.raises(ArgumentError, match=f"threat .*{message}"):
        specs.threat(spec)


@pytest.mark.parametrize(
    ("spec", "attack"),
    [
        ("fgsm", FGSM()),
        ("pgd", PGD()),
        ("mifgsm", MIFGSM()),
        ("mifgsm:decay=0,steps=3", MIFGSM(steps=3, decay=0.0)),
        ("ifgsm", PGD(steps=10, reach=2.0, random_start=False)),
        ("ifgsm:steps=7", PGD(7, 2.0, random_start=False)),
        ("pgd:steps=20,reach=3,step_size=2/255,random_start=false", PGD(20, 3.0, 2 / 255, False)),
        ("pgd:random_start=true", PGD()),
        ("pgd:steps=4e1", PGD(40)),
        ("pgd:", PGD()),
    ],
)
def test_attacks(spec, attack):
    assert specs.attack(spec) == attack


@pytest.mark.parametrize("name", specs.attack_registry())
def test_every_attack_can_be_written_with_all_fields_and_parsed_again(name):
    attack = specs.attack(name)
    values = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    assert set(specs.settable_fields(type(attack))) == set(values)
    words = [f"{key}={specs.format_value(value)}" for key, value in values.items()]
    assert specs.attack(":".join([name, ",".join(words)])) == attack
    for key, value in values.items():
        for other in others(type(attack), key, value):
            changed = specs.attack(f"{name}:{key}={specs.format_value(other)}")
            assert changed == dataclasses.replace(attack, **{key: other})
            assert type(getattr(changed, key)) in (type(other), float)


def others(cls, key, value):
    """Other values of a field."""
    hint = get_type_hints(cls)[key]
    if isinstance(value, str):
        return [choice for choice in get_args(hint) if choice != value]
    if str in get_args(hint):
        return ["conv1"]
    return [not value] if isinstance(value, bool) else [value / 2 if 0 < (value or 0) < 1 else (value or 0) + 1]


@dataclasses.dataclass(frozen=True)
class ManyFields(Attack):
    """A field of every type that a spec can set, and of some that it cannot."""

    recipe: Literal["paper", "scipy"] = "paper"
    layer: str = "conv1"
    pixels: int | None = None
    length: Optional[float] = 0.5  # noqa: UP045 - the older form is in use too
    order: Literal["auto"] | float = "auto"
    rank: Literal[1, 2, None] = 2
    quick: bool | None = None
    name: str | None = None
    either: int | str = 3
    inner: Attack = FGSM()  # noqa: RUF009 - a frozen one
    other: Attack | None = None
    weigh: Callable[[torch.Tensor], torch.Tensor] = torch.abs
    sizes: tuple[int, ...] = (1, 2)
    counted: list[int] = dataclasses.field(default_factory=list)
    hidden: int = dataclasses.field(default=3, init=False)
    serves: ClassVar = (Pixels, Linf)

    def run(self, problem):
        return problem.x


@dataclasses.dataclass(frozen=True)
class TwoRequired(Attack):
    layer: str
    steps: int

    def run(self, problem):
        return problem.x

    def check(self, threat):
        super().check(threat)
        if threat.eps > 2:
            raise ArgumentError(f"eps={threat.eps} is too much for TwoRequired; take at most 2")


@pytest.fixture
def local(monkeypatch):
    """Attacks of this package that the tests add."""
    known = {
        "many": (ManyFields, {}),
        "tuned": (ManyFields, {"layer": "conv2", "pixels": 4}),
        "required": (TwoRequired, {"steps": 3}),
    }
    monkeypatch.setattr(specs, "attack_registry", lambda: known)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("recipe=scipy", "recipe", "scipy"),
        ("layer=features.3", "layer", "features.3"),
        ("layer=a=b", "layer", "a=b"),
        ("layer=none", "layer", "none"),
        ("layer=3", "layer", "3"),
        ("pixels=5", "pixels", 5),
        ("pixels=none", "pixels", None),
        ("length=none", "length", None),
        ("length=2/255", "length", 2 / 255),
        ("length=1", "length", 1.0),
        ("order=auto", "order", "auto"),
        ("order=1/2", "order", 0.5),
        ("rank=1", "rank", 1),
        ("rank=none", "rank", None),
        ("quick=true", "quick", True),
        ("quick=false", "quick", False),
        ("quick=none", "quick", None),
        ("name=x", "name", "x"),
        ("name=none", "name", None),
        ("either=x", "either", "x"),
    ],
)
def test_fields_of_every_type(local, words, field, value):
    attack = specs.attack(f"many:{words}")
    assert attack == ManyFields(**{field: value})
    assert type(getattr(attack, field)) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recipe=nope", "recipe='nope' must be paper or scipy$"),
        ("recipe=", "recipe='' must be paper or scipy$"),
        ("recipe=none", "must be paper or scipy$"),
        ("rank=3", "rank='3' must be 1 or 2 or none$"),
        ("order=x", "order='x' must be auto or a number or a fraction such as 8/255$"),
        ("length=x", "length='x' must be a number or a fraction such as 8/255 or none$"),
        ("pixels=1.5", "pixels='1.5' must be a whole number or none$"),
        ("quick=1", "quick='1' must be true or false or none$"),
        *(
            (f"{name}=3", f"{name}='3' cannot be written on the command line; give it in Python")
            for name in ("inner", "other", "weigh", "sizes", "counted")
        ),
        (
            "hidden=3",
            "not a field=value of many; its fields: recipe, layer, pixels, length, order, rank, quick, name, either$",
        ),
    ],
)
def test_invalid_values_are_refused(local, words, message):
    with pytest.raises(ArgumentError, match=f"^attack 'many:{words}': .*{message}"):
        specs.attack(f"many:{words}")


def test_a_field_without_default_must_be_given(local):
    assert specs.attack("required:layer=conv1") == TwoRequired("conv1", 3)
    with pytest.raises(ArgumentError, match=r"^attack 'required': layer is missing; write required:layer=VALUE$"):
        specs.attack("required")
    assert specs.settable_fields(TwoRequired, {"steps": 3}) == {"layer": "...", "steps": "3"}


def test_fields_are_shown_as_text_that_can_be_parsed(local):
    fields = specs.settable_fields(ManyFields, {"layer": "conv2", "pixels": 4})
    assert fields == {
        "recipe": "paper",
        "layer": "conv2",
        "pixels": "4",
        "length": "0.5",
        "order": "auto",
        "rank": "2",
        "quick": "none",
        "name": "none",
        "either": "3",
    }
    assert specs.attack(
        "many:" + ",".join(f"{name}={word}" for name, word in fields.items() if name != "either")
    ) == ManyFields(layer="conv2", pixels=4)
    assert specs.attack("tuned") == ManyFields(layer="conv2", pixels=4)


def test_the_threats_that_an_attack_serves_are_shown_as_specs():
    @dataclasses.dataclass(frozen=True)
    class Own(Linf):
        pass

    expected = {
        (): "any threat",
        (Pixels,): "pixels:K",
        (L2, Linf): "linf:EPS, l2:EPS",
        (Own,): "Own",
        (L1, Own): "l1:EPS, Own",
        (Threat,): "linf:EPS, l2:EPS, l1:EPS, pixels:K",
    }
    for serves, text in expected.items():
        assert specs.served_threats(type("Some", (TwoRequired,), {"serves": serves})) == text


def test_a_threat_that_an_attack_does_not_serve_is_refused():
    specs.check_served("many", ManyFields(), "pixels:3", Pixels(3))
    specs.check_served("required:layer=x", TwoRequired("x", 3), "l2:1", L2(1.0))
    message = "attack 'many:layer=x' does not serve threat 'l2:0.5'; it serves linf:EPS, pixels:K"
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        specs.check_served("many:layer=x", ManyFields(), "l2:0.5", L2(0.5))
    with pytest.raises(ArgumentError, match=r"^attack 'required' in threat 'l2:3': eps=3.0 is too much for TwoRequired"):
        specs.check_served("required", TwoRequired("x", 3), "l2:3", L2(3.0))


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_is_refused_before_any_attack(local, order):
    message = "^attack {} does not serve threat {}; it serves linf:EPS, pixels:K$"
    cases = tuple(Case("zoo:digits-mlp", threat, "many") for threat in ("pixels:2", "l2:0.5"))
    with pytest.raises(ArgumentError, match=message.format("'many'", "'l2:0.5'")):
        load(Plan(cases[::order], "digits", limit=2))
    digits, seen = data.load("digits").part(limit=2), []
    with pytest.raises(ArgumentError, match=message.format('"ManyFields.*"', "'l1:3'")):
        evaluate_(lambda x: seen.append(x) or x.flatten(1)[:, :10], (digits.x, digits.y), threat=L1(3.0), attacks=ManyFields())
    assert not any(x.requires_grad for x in seen)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "'nope' does not exist; there are fgsm, ifgsm, mifgsm, pgd"),
        ("", "'' does not exist"),
        ("PGD", "'PGD' does not exist"),
        ("fgsm:steps=3", "'steps=3' is not a field=value of fgsm; its fields: none"),
        ("pgd:nope=3", "'nope=3' is not a field=value of pgd; its fields: steps, reach, step_size, random_start"),
        ("pgd:steps", "'steps' is not a field=value"),
        ("pgd:steps=3,", "'' is not a field=value"),
        ("pgd:=3", "'=3' is not a field=value"),
        ("pgd:steps=", "steps='' must be a number"),
        ("pgd:steps=2.5", "steps='2.5' must be a whole number"),
        ("pgd:steps=0", "'pgd:steps=0': steps=0 must be a whole number, at least 1"),
        ("pgd:steps=x", "steps='x'"),
        ("pgd:reach=0", "reach=0.0 must be a finite number above zero"),
        ("pgd:random_start=maybe", "='maybe' must be true or false"),
        ("pgd:random_start=1", "='1' must be true or false"),
        ("pgd:steps=1,steps=2", "steps is given twice"),
    ],
)
def test_invalid_attacks_are_refused(spec, message):
    with pytest.raises(ArgumentError, match=f"attack .*{message}"):
        specs.attack(spec)


def test_goals_compute_their_reference():
    y = torch.tensor([0, 2])
    goals = {name: specs.goal(name) for name in ("misclassify", "least-likely", "classify-as:2")}
    computed = {name: (spec.goal, spec.ref(lambda x: THREE[: len(x)], THREE, y, 2).tolist()) for name, spec in goals.items()}
    assert computed == {
        "misclassify": (Misclassify(), [0, 2]),
        "least-likely": (ClassifyAs(), [1, 2]),
        "classify-as:2": (ClassifyAs(), [2, 2]),
    }
    assert [spec.target_class for spec in goals.values()] == [None, None, 2]


def test_the_least_likely_class_is_computed_in_batches():
    sizes = []
    specs.goal("least-likely").ref(lambda x: sizes.append(len(x)) or x, THREE.repeat(5, 1), THREE[:0], 3)
    assert sizes == [3, 3, 3, 1]


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
def test_invalid_goals_are_refused(spec):
    with pytest.raises(ArgumentError, match="does not exist; write one of misclassify, least-likely, classify-as:K") as caught:
        specs.goal(spec)
    assert repr(spec) in str(caught.value)


def test_eps_is_always_finite():
    assert all(math.isfinite(specs.threat(spec).eps) for spec in ("linf:1", "l2:1e300", "l1:1e-300"))
