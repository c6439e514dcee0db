"""What `quantise:levels=8` means: the defences by name, and those of a file of yours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final, final, get_type_hints

import torch
from torch import Tensor

from robustkit._engine.factory import load_factory
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_rng, is_out_of_memory
from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import NONE
from robustkit.defence import Defence, guards_of
from robustkit.defences import GaussianNoise, JPEGLike, MedianFilter, Quantise, RandomResize
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.target import Fn, Target

__all__ = ["DEFENCES", "FORMS", "described", "guarded", "settable"]

DEFENCES: Final[Mapping[str, type[Defence]]] = {
    "quantise": Quantise,
    "jpeg": JPEGLike,
    "median": MedianFilter,
    "gaussian-noise": GaussianNoise,
    "random-resize": RandomResize,
}
FORMS: Final = (NONE, *DEFENCES, "path/to/file.py:factory", "package.module:factory")
_DRAWS: Final = 10  # of a random defence are averaged for a gradient: that of a single draw tells of that draw alone


def settable(name: str) -> dict[str, str]:
    """The fields of a defence as they stand when nothing is said, in words; `draws` is how many make a gradient."""
    cls = DEFENCES[name]
    fields = {field: specs.written(parameter.default) for field, parameter in _parameters(cls).items()}
    return fields | {"draws": str(_draws(cls))}


def guarded(spec: str, target: Target, device: str = "cpu") -> Target:
    """The target behind the defence that `spec` names: none, NAME, NAME:field=value,... or file.py:factory.

    Raises:
        ArgumentError: Nothing of that name, a field that it has not or a value that it refuses, a factory that fails or returns
            no defence.
    """
    if spec == NONE:
        return target
    name, _, given = spec.partition(":")
    if name not in DEFENCES and ":" not in spec:
        raise ArgumentError(f"defence {spec!r} does not exist; there are {', '.join(FORMS)}")
    defence, draws = _named(spec, name, given) if name in DEFENCES else (_of_factory(spec), None)
    return defence.to(device).guard(target, draws=_draws(defence) if draws is None else draws)


def described(target: Target) -> str | None:
    """The defences in front of a target, the first one first, each with every field; None where there is none."""
    guards = guards_of(target)
    return " before ".join(map(repr, guards)) if guards else None


def _draws(defence: Defence | type[Defence]) -> int:
    return _DRAWS if defence.stochastic else 1


def _parameters(cls: type[Defence]) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(cls.__init__).parameters.items() if name != "self"}


def _named(spec: str, name: str, given: str) -> tuple[Defence, int | None]:
    """A defence of ours with the fields that were given, and how many draws make a gradient."""
    cls = DEFENCES[name]
    hints = get_type_hints(cls.__init__) | {"draws": int}
    chosen: dict[str, Any] = {}
    for item in given.split(",") if given else []:
        field, equals, value = item.partition("=")
        if field not in settable(name) or not equals:
            there = ", ".join(settable(name))
            raise ArgumentError(f"defence {spec!r}: {item!r} is no field=value of {name}; its fields: {there}")
        if field in chosen:
            raise ArgumentError(f"defence {spec!r}: {field} is given twice; leave one out")
        chosen[field] = specs.read_value(hints[field], value, f"defence {spec!r}: {field}")
    draws = chosen.pop("draws", None)
    if draws is not None and draws < 1:
        raise ArgumentError(f"defence {spec!r}: draws={draws} must be at least 1; leave it out for {_draws(cls)}")
    try:
        return cls(**chosen), draws
    except ArgumentError as error:
        raise ArgumentError(f"defence {spec!r}: {error}") from error


def _of_factory(spec: str) -> Defence:
    try:
        with fork_rng(0):
            made = load_factory(spec)()
    except ArgumentError as error:
        raise ArgumentError(f"defence {error}") from error
    if not isinstance(made, Defence):
        raise ArgumentError(
            f"defence {spec!r} returned {type(made).__name__}; a factory must return a robustkit.defence.Defence, which says "
            "how it is differentiated"
        )
    return _Told(spec, made.eval())


@final
class _Told(Defence):
    """A defence whose own exceptions come out as ArgumentError, so that a defect of ours is not taken for one of it."""

    def __init__(self, spec: str, inner: Defence) -> None:
        super().__init__()
        self.spec, self.inner = spec, inner
        self.stochastic = inner.stochastic  # type: ignore[misc]  # of this one alone

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What the defence makes of x."""
        return self._told(self.inner, x) if noise is None else self.inner(x, noise)

    def views(self) -> dict[str, Fn]:
        """Those of the defence."""
        views = self.inner.checked_views()
        return {
            name: self.forward if view in (self.inner, self.inner.forward) else _View(self, view)
            for name, view in views.items()
        }

    def __repr__(self) -> str:
        return repr(self.inner)

    def _told(self, fn: Fn, x: Tensor) -> Tensor:
        try:
            out: Tensor = fn(x)
        except Exception as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            said = " ".join(str(error).split())[:300]
            raise ArgumentError(
                f"defence {self.spec!r} raised {type(error).__name__} on images {tuple(x.shape)}: {said}; it must take what "
                "the data holds"
            ) from error
        if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            told = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ArgumentError(f"defence {self.spec!r} made {told} of images {tuple(x.shape)}; it must make an image of each")
        return out


@final
class _View(torch.nn.Module):
    """A view of a defence whose exceptions come out as ArgumentError."""

    def __init__(self, told: _Told, view: Fn) -> None:
        super().__init__()
        self.told, self.view = told, view

    def forward(self, x: Tensor) -> Tensor:
        """What the view says."""
        return self.told._told(self.view, x)
