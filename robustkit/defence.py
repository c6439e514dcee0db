"""The interface of defences: a transformation of inputs, and how an adaptive adversary differentiates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar, final

from torch import Tensor, nn

from robustkit._engine.field_checks import at_least
from robustkit._engine.noise import Noise
from robustkit.errors import ArgumentError
from robustkit.target import Fn, Target

__all__ = ["Defence", "guards_of"]


class Defence(nn.Module, ABC):
    """A transformation of the input in front of a model. Each defence has to provide views: ways to differentiate it.

    Attributes:
        stochastic: Whether two calls on the same input may differ.
        decoder: The map from a latent space to inputs, (N, Z) -> (N, *S), or None if the defence has none.
    """

    stochastic: ClassVar[bool] = False
    decoder: Fn | None = None

    def __init__(self) -> None:
        super().__init__()
        self.training = False  # a defence has no mode of its own; submodules in training mode still raise the flag "train-mode"

    @abstractmethod
    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The deployed transformation, (N, *S) -> (N, *S); row i depends on row i only.

        Args:
            x: Inputs, any floating-point dtype.
            noise: The source of a stochastic defence's random numbers, one row per example, so that a draw can be frozen
                and shared. None: torch's global generator.
        """

    @abstractmethod
    def views(self) -> dict[str, Fn]:
        """Named functions (N, *S) -> (N, *S) that the adversary may differentiate instead; attacks use the first.

        Usual names: "exact" (the defence itself), "bpda" (see `robustkit.adaptive.bpda`), "short-chain", "encoder".
        """

    def score(self, x: Tensor) -> Tensor | None:
        """A detector's score of each input, (N,), larger is more suspicious; None if the defence is not a detector."""
        return None

    @final
    def guard(self, target: Target | nn.Module | Fn, *, draws: int = 1) -> Target:
        """The target with this defence in front: the composed function and composed views.

        Views have the names of the defence's views; if the target has several views, "bpda/exact" is the defence's "bpda"
        followed by the target's "exact". The first view is composed of the first of each. During an attack the defence and
        the target are in the same mode, that of the target. Guards can be nested: `outer.guard(inner.guard(model))` applies
        `outer` first.

        Args:
            target: The target to defend.
            draws: Number of gradients averaged per query if the defence is stochastic; the target's own number if larger.

        Raises:
            ArgumentError: The defence has no view, or one that is not a function, or `draws` is not an integer of at least 1.
        """
        target = Target.of(target)
        fn = partial(_compose, self, target.fn)
        views = {
            _view_name(name, target_name, len(target.views)): fn
            if transform in (self, self.forward) and model is target.fn
            else partial(_compose, transform, model)
            for name, transform in self.checked_views().items()
            for target_name, model in target.views.items()
        }
        features = None if target.features is None else partial(_compose, self, target.features)
        at_least(1, draws=draws)
        return Target(
            fn,
            _combined_module(self, target.module),
            views,
            max(draws, target.draws),
            self.stochastic or target.stochastic,
            target.mode,
            features,
            target.batch_size,
        )

    @final
    def checked_views(self) -> dict[str, Fn]:
        """`views()`, checked.

        Raises:
            ArgumentError: There is no view, or one that is not a function.
        """
        views = self.views()
        if not isinstance(views, dict) or not views or not all(callable(view) for view in views.values()):
            raise ArgumentError(f"views() of {type(self).__name__} returned {views!r}; it must return a dict of functions")
        return views


def guards_of(target: Target) -> tuple[Defence, ...]:
    """The defences in front of a target, in the order in which they are applied; empty if it is not guarded."""
    defences, fn = [], target.fn
    while isinstance(fn, partial) and fn.func is _compose:
        defences.append(fn.args[0])
        fn = fn.args[1]
    return tuple(defences)


def _compose(transform: Fn, model: Fn, x: Tensor) -> Any:  # Any: what a target returns
    """`model(transform(x))`; a partial of a module-level function can be pickled, and its modules can be found."""
    return model(transform(x))


def _view_name(name: str, target_name: str, target_views: int) -> str:
    return name if target_views == 1 else f"{name}/{target_name}"


@final
class _DefendedModule(nn.Module):
    """A container for a defence and the module behind it, so that both are frozen and restored."""

    def __init__(self, defence: Defence, module: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList((defence, module))
        self.training = self.parts.training = False  # containers have no mode: only their contents may raise "train-mode"


def _combined_module(defence: Defence, module: nn.Module | None) -> nn.Module:
    return defence if module is None else _DefendedModule(defence, module)
