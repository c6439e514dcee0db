"""The specs of defences: `quantise:levels=8`, or a factory such as `path/to/file.py:factory`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Final, final, get_type_hints

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

__all__ = ["DEFENCES", "FORMS", "defence_recipe", "guard_target", "settable_fields"]

DEFENCES: Final[Mapping[str, type[Defence]]] = {
    "quantise": Quantise,
    "jpeg": JPEGLike,
    "median": MedianFilter,
    "gaussian-noise": GaussianNoise,
    "random-resize": RandomResize,
}
FORMS: Final = (NONE, *DEFENCES, "path/to/file.py:factory", "package.module:factory")
_DRAWS: Final = 10  # of a random defence, averaged for a gradient (EOT)


def settable_fields(name: str) -> dict[str, str]:
    """The fields of a defence with their defaults as text; `draws` is the number of draws per gradient."""
    cls = DEFENCES[name]
    fields = {field: specs.format_value(parameter.default) for field, parameter in _parameters(cls).items()}
    return fields | {"draws": str(_draws(cls))}


def guard_target(spec: str, target: Target, device: str = "cpu") -> Target:
    """The target behind the defence that `spec` names: none, NAME, NAME:field=value,... or file.py:factory.

    Raises:
        ArgumentError: There is no such defence or field, a value is invalid, or a factory fails or returns something else than
            a defence.
    """
    if spec == NONE:
        return target
    name, _, settings = spec.partition(":")
    if name not in DEFENCES and ":" not in spec:
        raise ArgumentError(f"defence {spec!r} does not exist; there are {', '.join(FORMS)}")
    defence, draws = _parse(spec, name, settings) if name in DEFENCES else (_from_factory(spec), None)
    return defence.to(device).guard(target, draws=_draws(defence) if draws is None else draws)


def defence_recipe(target: Target) -> str | None:
    """The defences in front of a target with all their fields, the first one applied first; None if there are none."""
    guards = guards_of(target)
    return " before ".join(map(repr, guards)) if guards else None


def _draws(defence: Defence | type[Defence]) -> int:
    return _DRAWS if defence.stochastic else 1


def _parameters(cls: type[Defence]) -> dict[str, inspect.Parameter]:
    return {name: one for name, one in inspect.signature(cls.__init__).parameters.items() if name != "self"}


def _parse(spec: str, name: str, settings: str) -> tuple[Defence, int | None]:
    """A defence of this package, and the number of draws per gradient, if it is set."""
    cls = DEFENCES[name]
    hints = get_type_hints(cls.__init__) | {"draws": int}
    fields = list(settable_fields(name))
    chosen = specs.parse_fields(settings, {field: hints[field] for field in fields}, fields, f"defence {spec!r}", name)
    draws = chosen.pop("draws", None)
    if draws is not None and draws < 1:
        raise ArgumentError(f"defence {spec!r}: draws={draws} must be at least 1; leave it out for {_draws(cls)}")
    try:
        return cls(**chosen), draws
    except ArgumentError as error:
        raise ArgumentError(f"defence {spec!r}: {error}") from error


def _from_factory(spec: str) -> Defence:
    try:
        with fork_rng(0):
            defence = load_factory(spec)()
    except ArgumentError as error:
        raise ArgumentError(f"defence {error}") from error
    if not isinstance(defence, Defence):
        raise ArgumentError(
            f"defence {spec!r} returned {type(defence).__name__}; a factory must return a robustkit.defence.Defence, which "
            "defines how it is differentiated"
        )
    return _ErrorTranslator(spec, defence.eval())


@final
class _ErrorTranslator(Defence):
    """Raises the exceptions of a defence as ArgumentError, which tells them apart from defects of this package."""

    def __init__(self, spec: str, inner: Defence) -> None:
        super().__init__()
        self.spec, self.inner = spec, inner
        self.stochastic = inner.stochastic  # type: ignore[misc]  # set for each instance

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The defended images."""
        return self.translated(self.inner, x) if noise is None else self.inner(x, noise)

    def views(self) -> dict[str, Fn]:
        """The views of the defence."""
        views = self.inner.checked_views()
        return {
            name: self.forward if view in (self.inner, self.inner.forward) else _View(self, view)
            for name, view in views.items()
        }

    def __repr__(self) -> str:
        return repr(self.inner)

    def translated(self, fn: Fn, x: Tensor) -> Tensor:
        """`fn` of the images; its exceptions and invalid outputs are raised as ArgumentError."""
        try:
            out: Tensor = fn(x)
        except Exception as error:
            if isinstance(error, RobustkitError) or is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise ArgumentError(
                f"defence {self.spec!r} raised {type(error).__name__} on images {tuple(x.shape)}: {reason}; it must "
                "accept the images of the data"
            ) from error
        if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            output = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ArgumentError(
                f"defence {self.spec!r} returned {output} for images {tuple(x.shape)}; it must return one image for each"
            )
        return out


@final
class _View(torch.nn.Module):
    """A view of a defence, with its exceptions raised as ArgumentError."""

    def __init__(self, translator: _ErrorTranslator, view: Fn) -> None:
        super().__init__()
        self.translator, self.view = translator, view

    def forward(self, x: Tensor) -> Tensor:
        """The output of the view."""
        return self.translator.translated(self.view, x)
