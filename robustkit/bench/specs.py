"""What the words of the command line mean: `linf:8/255`, `pgd:steps=20`, `least-likely`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, final, get_args, get_type_hints

import torch
from torch import Tensor

from robustkit.attack import Attack
from robustkit.attacks import FGSM, MIFGSM, PGD
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify, least_likely
from robustkit.target import Fn
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["GOALS", "THREATS", "Aim", "attack", "attack_names", "goal", "number", "threat", "threat_words"]

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
    """The attacks of the command line: for each name its class, and the fields in which it differs from the class's own."""
    return {
        "fgsm": (FGSM, {}),
        "ifgsm": (PGD, {"steps": 10, "reach": 2.0, "random_start": False}),
        "mifgsm": (MIFGSM, {}),
        "pgd": (PGD, {}),
    }


def attack(spec: str) -> Attack:
    """The attack that `spec` names: NAME or NAME:field=value,field=value."""
    name, _, given = spec.partition(":")
    known = attack_names()
    if name not in known:
        raise ArgumentError(f"attack {name!r} does not exist; there are {', '.join(known)}")
    cls, preset = known[name]
    hints = get_type_hints(cls)
    kinds = {field.name: _kind(hints[field.name]) for field in fields(cls)}  # type: ignore[arg-type]
    chosen: dict[str, Any] = {}
    for item in given.split(",") if given else []:
        field, equals, value = item.partition("=")
        if field not in kinds or not equals:
            raise ArgumentError(
                f"attack {spec!r}: {item!r} is no field=value of {name}; its fields: {', '.join(kinds) or 'none'}"
            )
        if field in chosen:
            raise ArgumentError(f"attack {spec!r}: {field} is given twice; leave one out")
        chosen[field] = _value(kinds[field], value, f"attack {spec!r}: {field}")
    with _named(f"attack {spec!r}"):
        return cls(**(preset | chosen))


def _kind(hint: Any) -> str:  # Any: a type, or a union of some
    """The type of a field in a word; of `float | None`, the part that can be written."""
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    return str(getattr(kinds[0], "__name__", kinds[0]))


def _value(kind: str, text: str, name: str) -> Any:  # Any: the type is that of the field
    if kind == "bool":
        if text not in ("true", "false"):
            raise ArgumentError(f"{name}={text!r} must be true or false")
        return text == "true"
    value = number(text, name)
    if kind == "int":
        if not value.is_integer():
            raise ArgumentError(f"{name}={text!r} must be a whole number")
        return int(value)
    return value


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Errors of a constructor, with the words that led to it."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{what}: {error}") from error


@final
@dataclass(frozen=True)
class Aim:
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


def goal(spec: str) -> Aim:
    """The aim that `spec` names: misclassify, least-likely or classify-as:K."""
    if spec == "misclassify":
        return Aim(Misclassify(), lambda model, x, y, batch_size: y)
    if spec == "least-likely":
        return Aim(ClassifyAs(), lambda model, x, y, batch_size: least_likely(model, x, batch_size=batch_size))
    kind, _, text = spec.partition(":")
    if kind == "classify-as" and text.isdecimal() and len(text) < 10:
        wanted = int(text)
        return Aim(ClassifyAs(), lambda model, x, y, batch_size: torch.full_like(y, wanted), wanted)
    raise ArgumentError(f"goal {spec!r} does not exist; write one of {', '.join(GOALS)} with a class K")
