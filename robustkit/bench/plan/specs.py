"""What the words of the command line mean: `linf:8/255`, `pgd:steps=20`, `least-likely`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, fields
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, Literal, Union, final, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from robustkit.attack import Attack
from robustkit.attacks import (
    APGD,
    FAB,
    FGSM,
    FMN,
    L1APGD,
    MIFGSM,
    PGD,
    DeepFool,
    OnePixel,
    PixelSearch,
    RayS,
    SparseRS,
    Square,
    Standard,
    UniversalDeepFool,
    UniversalPGD,
    UniversalSingular,
)
from robustkit.bench.plan.plugins import Plugin, blamed, published
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify, least_likely
from robustkit.target import Fn
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = [
    "GOALS",
    "THREATS",
    "GoalSpec",
    "attack",
    "attack_names",
    "check_served",
    "goal",
    "number",
    "packages",
    "plugin",
    "plugins",
    "read_value",
    "served",
    "serves",
    "settable",
    "threat",
    "threat_words",
    "written",
]

THREATS: tuple[tuple[str, type[Threat], str], ...] = (
    ("linf", Linf, "linf:8/255"),
    ("l2", L2, "l2:0.5"),
    ("l1", L1, "l1:12"),
    ("pixels", Pixels, "pixels:1"),
)

GOALS = ("misclassify", "least-likely", "classify-as:K")


def number(text: str, name: str) -> float:
    """A decimal number or a fraction, read exactly and rounded once.

    Raises:
        ArgumentError: It is neither; `name` says what it was meant to be.
    """
    try:
        # Not Fraction for decimals: it would write out all the digits of 1e999999999.
        value = float(Fraction(text.strip())) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentError(f"{name}={text!r} must be a number or a fraction such as 8/255")
    return value


def threat(spec: str) -> Threat:
    """The threat that `spec` names: linf:EPS, l2:EPS, l1:EPS or pixels:K, on images in [0, 1]."""
    kind, colon, eps = spec.partition(":")
    for name, cls, _ in THREATS:
        if kind == name and colon:
            value = number(eps, f"threat {spec!r}: eps")
            with _named(f"threat {spec!r}"):
                return cls(int(value) if cls is Pixels and value.is_integer() else value)
    raise ArgumentError(f"threat {spec!r} does not exist; write one of {', '.join(example for *_, example in THREATS)}")


def threat_words(threat: Threat) -> str:
    """The words for a threat, as short as they can be read back; bounds other than [0, 1] are told too.

    Raises:
        ArgumentError: An eps for each example, which no words can say.
    """
    if isinstance(threat.eps, Tensor):
        raise ArgumentError("eps holds a number for each example; a run needs one for all: several threats instead")
    name = next((name for name, cls, _ in THREATS if type(threat) is cls), type(threat).__name__)
    words = f"{name}:{threat.eps:g}" if float(f"{threat.eps:g}") == threat.eps else f"{name}:{_short(threat.eps)}"
    return words if threat.bounds == (0.0, 1.0) else f"{words} in {threat.bounds}"


def _short(value: float) -> str:
    """A fraction of 255 where it is one exactly, else all digits."""
    parts = value * 255
    whole = round(parts)
    return f"{whole}/255" if whole / 255 == value else repr(value)


def attack_names() -> dict[str, tuple[type[Attack], dict[str, Any]]]:
    """Our attacks by name: for each its class, and the fields in which it differs from the class's own."""
    return {
        "fgsm": (FGSM, {}),
        "ifgsm": (PGD, {"steps": 10, "reach": 2.0, "random_start": False}),
        "mifgsm": (MIFGSM, {}),
        "pgd": (PGD, {}),
        "apgd": (APGD, {}),
        "l1apgd": (L1APGD, {}),
        "standard": (Standard, {}),
        "deepfool": (DeepFool, {}),
        "fab": (FAB, {}),
        "fmn": (FMN, {}),
        "square": (Square, {}),
        "rays": (RayS, {}),
        "onepixel": (OnePixel, {}),
        "pixelsearch": (PixelSearch, {}),
        "sparse-rs": (SparseRS, {}),
        "uap-pgd": (UniversalPGD, {}),
        "uap-deepfool": (UniversalDeepFool, {}),
        "uap-singular": (UniversalSingular, {}),
    }


def plugins() -> dict[str, Plugin]:
    """The attacks of other installed packages, by name; none is loaded, and some may turn out to be broken."""
    return published(attack_names())


def plugin(spec: str) -> Plugin | None:
    """The plugin whose attack `spec` names; None where it is ours, or nobody's."""
    name = spec.partition(":")[0]
    return None if name in attack_names() else plugins().get(name)


def packages(attacks: Iterable[str]) -> dict[str, str]:
    """What numbers depend on besides robustkit: the packages, with versions, of those attacks that are not ours."""
    theirs = [plugin(spec) for spec in dict.fromkeys(attacks)]
    told = sorted({" ".join(package) for one in theirs if one is not None for package in one.packages})
    return {"plugins": ", ".join(told)} if told else {}


def attack(spec: str) -> Attack:
    """The attack that `spec` names: NAME or NAME:field=value,field=value; a package that publishes it is imported."""
    name, _, given = spec.partition(":")
    theirs = plugin(name)
    cls, preset = _attack_class(name, theirs)
    hints, known = get_type_hints(cls), {field.name: field for field in _fields(cls)}
    chosen: dict[str, Any] = {}
    for item in given.split(",") if given else []:
        field, equals, value = item.partition("=")
        if field not in known or not equals:
            there = ", ".join(settable(cls)) or "none"
            raise ArgumentError(f"attack {spec!r}: {item!r} is no field=value of {name}; its fields: {there}")
        if field in chosen:
            raise ArgumentError(f"attack {spec!r}: {field} is given twice; leave one out")
        chosen[field] = read_value(hints[field], value, f"attack {spec!r}: {field}")
    missing = [field for field, held in known.items() if _default(held) is MISSING and field not in preset | chosen]
    if missing:
        raise ArgumentError(f"attack {spec!r}: {missing[0]} is missing; write {name}:{missing[0]}=VALUE")
    with _named(f"attack {spec!r}"), blamed(theirs, spec):
        return cls(**(preset | chosen))


def _attack_class(name: str, theirs: Plugin | None) -> tuple[type[Attack], dict[str, Any]]:
    if theirs is not None:
        with _named(f"attack {name!r}"):
            return theirs.load(), {}
    ours = attack_names()
    if name not in ours:
        there = [*ours, *(other for other, one in plugins().items() if not one.trouble)]
        raise ArgumentError(f"attack {name!r} does not exist; there are {', '.join(there)}")
    return ours[name]


def settable(cls: type[Attack], preset: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The fields that can be given on the command line, each as it stands when nothing is said, in words."""
    hints, told = get_type_hints(cls), {field.name: _default(field) for field in _fields(cls)} | dict(preset or {})
    return {name: "..." if value is MISSING else written(value) for name, value in told.items() if _words_for(hints[name])}


def written(value: Any) -> str:  # Any: the value of a field
    """A value in the words that are read back as it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def served(cls: type[Attack]) -> str:
    """The threats that an attack serves, in words: `linf:EPS, pixels:K`."""
    if not cls.serves:
        return "any threat"
    known = {kind: f"{name}:{'K' if kind is Pixels else 'EPS'}" for name, kind, _ in THREATS if issubclass(kind, cls.serves)}
    others = [kind.__name__ for kind in cls.serves if not any(issubclass(one, kind) for one in known)]
    return ", ".join([*known.values(), *others])


def serves(spec: str, kind: type[Threat]) -> bool:
    """Whether the attack works with threats of a kind at all."""
    served_kinds = attack(spec).serves
    return not served_kinds or issubclass(kind, served_kinds)


def check_served(attack_spec: str, attack: Attack, threat_spec: str, threat: Threat) -> None:
    """Refuse a threat that an attack does not serve, in the words of the command line.

    Raises:
        ArgumentError: With the threats that it serves.
    """
    if attack.serves and not isinstance(threat, attack.serves):
        raise ArgumentError(f"attack {attack_spec!r} does not serve threat {threat_spec!r}; it serves {served(type(attack))}")
    with _named(f"attack {attack_spec!r} in threat {threat_spec!r}"):
        attack.check(threat)


def _fields(cls: type[Attack]) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]  # type: ignore[arg-type]


def _default(field: Field[Any]) -> Any:  # Any: the type is that of the field
    """What a field is when nothing is said, or MISSING."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _kinds(hint: Any) -> tuple[Any, ...]:  # Any: a type, or a union of some
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> dict[str, Any]:
    """The values that a type lists, by the words for them."""
    listed = [value for kind in _kinds(hint) if get_origin(kind) is Literal for value in get_args(kind)]
    listed += [value for kind in _kinds(hint) for value in {bool: (True, False), NoneType: (None,)}.get(kind, ())]
    return {written(value): value for value in listed}


def _words_for(hint: Any) -> list[str]:
    """What may be written for a type; nothing for one that has no words, such as another attack."""
    kinds = {int: "a whole number", float: "a number or a fraction such as 8/255", str: "text"}
    told = [kinds[kind] for kind in _kinds(hint) if kind in kinds]
    words = [*(word for word, value in _choices(hint).items() if value is not None), *told]
    return [*words, "none"] if words and None in _choices(hint).values() else words


def read_value(hint: Any, text: str, name: str) -> Any:  # Any: the type is that of the field
    """What a text means for a field of a type; `name` says which, where it means nothing."""
    choices, kinds, words = _choices(hint), _kinds(hint), _words_for(hint)
    if not words:
        raise ArgumentError(f"{name}={text!r} cannot be written on the command line; give it in Python, to robustkit.evaluate")
    if text in choices:
        return choices[text]
    if str in kinds:
        return text
    try:
        value = number(text, name)
    except ArgumentError as error:
        raise (ArgumentError(f"{name}={text!r} must be {' or '.join(words)}") if choices else error) from error
    if float in kinds:
        return value
    if int not in kinds or not value.is_integer():
        raise ArgumentError(f"{name}={text!r} must be {' or '.join(words)}")
    return int(value)


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of a constructor, with the words that led to it."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{what}: {error}") from error


@final
@dataclass(frozen=True)
class GoalSpec:
    """A goal, and how its reference follows from the model, the images and their labels.

    Attributes:
        goal: What success is.
        ref: From a model, images (N, C, H, W) of which at most the given number go through it at once, and labels (N,), to
            what the goal compares with, (N,).
        wanted: The one class that it names, or None.
    """

    goal: Goal
    ref: Callable[[Fn, Tensor, Tensor, int], Tensor]
    wanted: int | None = None


def goal(spec: str) -> GoalSpec:
    """The aim that `spec` names: misclassify, least-likely or classify-as:K."""
    if spec == "misclassify":
        return GoalSpec(Misclassify(), lambda model, x, y, batch_size: y)
    if spec == "least-likely":
        return GoalSpec(ClassifyAs(), lambda model, x, y, batch_size: least_likely(model, x, batch_size=batch_size))
    kind, _, text = spec.partition(":")
    if kind == "classify-as" and text.isdecimal() and len(text) < 10:
        wanted = int(text)
        return GoalSpec(ClassifyAs(), lambda model, x, y, batch_size: torch.full_like(y, wanted), wanted)
    raise ArgumentError(f"goal {spec!r} does not exist; write one of {', '.join(GOALS)} with a class K")
