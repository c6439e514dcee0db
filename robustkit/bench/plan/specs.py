"""The specs of threats, attacks and goals: `linf:8/255`, `pgd:steps=20`, `least-likely`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from robustkit.bench.plan.plugins import Plugin, attribute_errors, find_plugins
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify, least_likely
from robustkit.target import Fn
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = [
    "GOALS",
    "THREATS",
    "GoalSpec",
    "attack",
    "attack_registry",
    "check_served",
    "format_value",
    "goal",
    "number",
    "parse_fields",
    "parse_value",
    "plugin",
    "plugin_packages",
    "plugins",
    "served_threats",
    "serves",
    "settable_fields",
    "threat",
    "threat_to_spec",
]

THREATS: tuple[tuple[str, type[Threat], str], ...] = (
    ("linf", Linf, "linf:8/255"),
    ("l2", L2, "l2:0.5"),
    ("l1", L1, "l1:12"),
    ("pixels", Pixels, "pixels:1"),
)

GOALS = ("misclassify", "least-likely", "classify-as:K")


def number(text: str, name: str) -> float:
    """Parse a decimal number or a fraction, exactly and rounded once.

    Raises:
        ArgumentError: `text` is neither; the message begins with `name`.
    """
    try:
        # Not Fraction for decimals: it would expand all digits of 1e999999999.
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
            with _prefixed(f"threat {spec!r}"):
                return cls(int(value) if cls is Pixels and value.is_integer() else value)
    raise ArgumentError(f"threat {spec!r} does not exist; write one of {', '.join(example for *_, example in THREATS)}")


def threat_to_spec(threat: Threat) -> str:
    """The shortest spec that gives this threat; bounds other than [0, 1] are appended.

    Raises:
        ArgumentError: The threat has one eps per example, for which there is no spec.
    """
    if isinstance(threat.eps, Tensor):
        raise ArgumentError("eps has a number for each example; a run needs one for all: give several threats instead")
    name = next((name for name, cls, _ in THREATS if type(threat) is cls), type(threat).__name__)
    spec = f"{name}:{threat.eps:g}" if float(f"{threat.eps:g}") == threat.eps else f"{name}:{_format_exactly(threat.eps)}"
    return spec if threat.bounds == (0.0, 1.0) else f"{spec} in {threat.bounds}"


def _format_exactly(value: float) -> str:
    """A fraction of 255 if that is exact, else all digits."""
    numerator = round(value * 255)
    return f"{numerator}/255" if numerator / 255 == value else repr(value)


def attack_registry() -> dict[str, tuple[type[Attack], dict[str, Any]]]:
    """The attacks of this package by name: the class, and the fields that differ from its defaults."""
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
    """The attacks of other installed packages by name. They are not imported here, so some may turn out to be broken."""
    return find_plugins(attack_registry())


def plugin(spec: str) -> Plugin | None:
    """The plugin of the attack that `spec` names; None if it is an attack of this package or unknown."""
    name = spec.partition(":")[0]
    return None if name in attack_registry() else plugins().get(name)


def plugin_packages(attacks: Iterable[str]) -> dict[str, str]:
    """The entry "plugins" of an environment: the packages of these attacks with versions; empty if there are none."""
    used = [plugin(spec) for spec in dict.fromkeys(attacks)]
    versions = sorted({" ".join(package) for one in used if one is not None for package in one.packages})
    return {"plugins": ", ".join(versions)} if versions else {}


def attack(spec: str) -> Attack:
    """The attack that `spec` names: NAME or NAME:field=value,field=value. If a plugin provides it, its package is imported."""
    name, _, settings = spec.partition(":")
    provider = plugin(name)
    cls, preset = _attack_class(name, provider)
    hints, known = get_type_hints(cls), {field.name: field for field in _fields(cls)}
    chosen = parse_fields(
        settings, {field: hints[field] for field in known}, list(settable_fields(cls)), f"attack {spec!r}", name
    )
    missing = [name for name, field in known.items() if _default(field) is MISSING and name not in preset | chosen]
    if missing:
        raise ArgumentError(f"attack {spec!r}: {missing[0]} is missing; write {name}:{missing[0]}=VALUE")
    with _prefixed(f"attack {spec!r}"), attribute_errors(provider, spec):
        return cls(**(preset | chosen))


def _attack_class(name: str, provider: Plugin | None) -> tuple[type[Attack], dict[str, Any]]:
    """The class of an attack, and the fields that differ from its defaults."""
    if provider is not None:
        with _prefixed(f"attack {name!r}"):
            return provider.load(), {}
    own = attack_registry()
    if name not in own:
        available = [*own, *(other for other, one in plugins().items() if not one.problem)]
        raise ArgumentError(f"attack {name!r} does not exist; there are {', '.join(available)}")
    return own[name]


def parse_fields(
    settings: str, hints: Mapping[str, Any], settable_names: Sequence[str], prefix: str, name: str
) -> dict[str, Any]:
    """Parse `field=value,field=value`.

    Args:
        settings: The text; it may be empty.
        hints: The type of each field.
        settable_names: The fields to list in a message.
        prefix: The beginning of messages.
        name: What has these fields, for messages.

    Raises:
        ArgumentError: A field is unknown or given twice, or a value is invalid.
    """
    chosen: dict[str, Any] = {}
    for item in settings.split(",") if settings else []:
        field, equals, value = item.partition("=")
        if field not in hints or not equals:
            valid = ", ".join(settable_names) or "none"
            raise ArgumentError(f"{prefix}: {item!r} is not a field=value of {name}; its fields: {valid}")
        if field in chosen:
            raise ArgumentError(f"{prefix}: {field} is given twice; leave one out")
        chosen[field] = parse_value(hints[field], value, f"{prefix}: {field}")
    return chosen


def settable_fields(cls: type[Attack], preset: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The fields that can be set on the command line, with their defaults as text; "..." for a required field."""
    hints, defaults = get_type_hints(cls), {field.name: _default(field) for field in _fields(cls)} | dict(preset or {})
    settable_names = [name for name in defaults if _accepted(hints[name])]
    return {name: "..." if defaults[name] is MISSING else format_value(defaults[name]) for name in settable_names}


def format_value(value: Any) -> str:  # Any: the value of a field
    """A field value as text that `parse_value` reads."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def served_threats(cls: type[Attack]) -> str:
    """The threats that an attack serves, as text: `linf:EPS, pixels:K`."""
    if not cls.serves:
        return "any threat"
    known = {kind: f"{name}:{'K' if kind is Pixels else 'EPS'}" for name, kind, _ in THREATS if issubclass(kind, cls.serves)}
    others = [kind.__name__ for kind in cls.serves if not any(issubclass(one, kind) for one in known)]
    return ", ".join([*known.values(), *others])


def serves(spec: str, kind: type[Threat]) -> bool:
    """Whether an attack serves threats of a class."""
    served_kinds = attack(spec).serves
    return not served_kinds or issubclass(kind, served_kinds)


def check_served(attack_spec: str, attack: Attack, threat_spec: str, threat: Threat) -> None:
    """Check that an attack serves a threat; errors name both by their specs.

    Raises:
        ArgumentError: It does not; the message has the threats that it serves.
    """
    if attack.serves and not isinstance(threat, attack.serves):
        raise ArgumentError(
            f"attack {attack_spec!r} does not serve threat {threat_spec!r}; it serves {served_threats(type(attack))}"
        )
    with _prefixed(f"attack {attack_spec!r} in threat {threat_spec!r}"):
        attack.check(threat)


def _fields(cls: type[Attack]) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]  # type: ignore[arg-type]


def _default(field: Field[Any]) -> Any:  # Any: the type is that of the field
    """The default of a field, or MISSING."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def _kinds(hint: Any) -> tuple[Any, ...]:  # Any: a type, or a union of types
    """The types of a union; a single type if it is none."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _choices(hint: Any) -> dict[str, Any]:
    """The values that a type enumerates (of Literal, bool and None), by their text."""
    listed = [value for kind in _kinds(hint) if get_origin(kind) is Literal for value in get_args(kind)]
    listed += [value for kind in _kinds(hint) for value in {bool: (True, False), NoneType: (None,)}.get(kind, ())]
    return {format_value(value): value for value in listed}


def _accepted(hint: Any) -> list[str]:
    """What may be written for a type, for messages; empty for a type that text cannot give, such as another attack."""
    kinds = {int: "a whole number", float: "a number or a fraction such as 8/255", str: "text"}
    described = [kinds[kind] for kind in _kinds(hint) if kind in kinds]
    accepted = [*(text for text, value in _choices(hint).items() if value is not None), *described]
    return [*accepted, "none"] if accepted and None in _choices(hint).values() else accepted


def parse_value(hint: Any, text: str, name: str) -> Any:  # Any: the type is that of the field
    """Parse the value of a field.

    Args:
        hint: The type of the field.
        text: The value as text.
        name: The name of the field, with which messages begin.

    Raises:
        ArgumentError: The text is not a value of this type.
    """
    choices, kinds, accepted = _choices(hint), _kinds(hint), _accepted(hint)
    if not accepted:
        raise ArgumentError(f"{name}={text!r} cannot be written on the command line; give it in Python, to robustkit.evaluate")
    if text in choices:
        return choices[text]
    if str in kinds:
        return text
    try:
        value = number(text, name)
    except ArgumentError as error:
        raise (ArgumentError(f"{name}={text!r} must be {' or '.join(accepted)}") if choices else error) from error
    if float in kinds:
        return value
    if int not in kinds or not value.is_integer():
        raise ArgumentError(f"{name}={text!r} must be {' or '.join(accepted)}")
    return int(value)


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    """Add a prefix to the messages of ArgumentErrors."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{prefix}: {error}") from error


@final
@dataclass(frozen=True)
class GoalSpec:
    """A goal, and how its reference is computed.

    Attributes:
        goal: The goal.
        ref: Maps a model, images (N, C, H, W), labels (N,) and the batch size to the reference of the goal, (N,).
        target_class: The class that the spec names; None if it names none.
    """

    goal: Goal
    ref: Callable[[Fn, Tensor, Tensor, int], Tensor]
    target_class: int | None = None


def goal(spec: str) -> GoalSpec:
    """The goal that `spec` names: misclassify, least-likely or classify-as:K."""
    if spec == "misclassify":
        return GoalSpec(Misclassify(), lambda model, x, y, batch_size: y)
    if spec == "least-likely":
        return GoalSpec(ClassifyAs(), lambda model, x, y, batch_size: least_likely(model, x, batch_size=batch_size))
    kind, _, text = spec.partition(":")
    if kind == "classify-as" and text.isdecimal() and len(text) < 10:
        target_class = int(text)
        return GoalSpec(ClassifyAs(), lambda model, x, y, batch_size: torch.full_like(y, target_class), target_class)
    raise ArgumentError(f"goal {spec!r} does not exist; write one of {', '.join(GOALS)} with a class K")
