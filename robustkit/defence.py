"""WHAT A DEFENCE MUST SAY OF ITSELF: what it does to an input, and how an adversary who knows it differentiates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, final

from torch import Tensor, nn

from robustkit._engine.noise import Noise
from robustkit.errors import ArgumentError
from robustkit.target import Fn, Target

__all__ = ["Defence", "guards_of"]


class Defence(nn.Module, ABC):
    """Something that is done to an input before a model sees it. None exists without views: ways to differentiate it.

    Attributes:
        stochastic: Whether two calls on the same input may differ.
        decoder: The map from a latent space to inputs, where the defence has one: (N, Z) -> (N, *S).
    """

    stochastic: ClassVar[bool] = False
    decoder: Fn | None = None

    def __init__(self) -> None:
        super().__init__()
        self.training = False  # it is made to be deployed; parts of it that are in training mode still raise a flag

    @abstractmethod
    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What is deployed, (N, *S) -> (N, *S); row i depends on row i only.

        Args:
            x: Inputs, any floating type.
            noise: Where a stochastic defence takes its random numbers, a row an example, so that a draw can be frozen and
                shared; None draws from torch's global generator.
        """

    @abstractmethod
    def views(self) -> dict[str, Fn]:
        """Named functions (N, *S) -> (N, *S) that the adversary may differentiate instead; attacks follow the first.

        Usual names: "exact" (the defence itself), "bpda" (see `robustkit.adaptive.bpda`), "short-chain", "encoder".
        """

    def score(self, x: Tensor) -> Tensor | None:
        """How suspicious each input is, (N,), larger is more; None where the defence is no detector."""
        return None

    @final
    def guard(self, target: Target | nn.Module | Fn, *, draws: int = 1) -> Target:
        """The target behind this defence: its function, and its views through those of the defence.

        Views are named as the defence names them; where the target has several, "bpda/exact" is the defence's "bpda" with
        the target's "exact" behind it. The first is the first of the defence with the first of the target. Defence and
        target are held in the same mode, the target's, during an attack. Guards may be stacked: the inner one guards first.

        Args:
            target: What is defended.
            draws: Gradients averaged per query, where the defence is stochastic; at least those of the target.

        Raises:
            ArgumentError: The defence names no view, or one that is no function; `draws` is below 1.
        """
        target = Target.of(target)
        fn = partial(_chained, self, target.fn)
        views = {
            _name(mine, theirs, len(target.views)): fn
            if first in (self, self.forward) and then is target.fn
            else partial(_chained, first, then)
            for mine, first in self.checked_views().items()
            for theirs, then in target.views.items()
        }
        features = None if target.features is None else partial(_chained, self, target.features)
        if not isinstance(draws, int) or draws < 1:
            raise ArgumentError(f"draws={draws!r} must be a whole number, at least 1")
        return Target(
            fn,
            _both(self, target.module),
            views,
            max(draws, target.draws),
            self.stochastic or target.stochastic,
            target.mode,
            features,
            target.batch_size,
        )

    @final
    def checked_views(self) -> dict[str, Fn]:
        """`views()`, refused where it names none or something that is no function."""
        views = self.views()
        if not isinstance(views, dict) or not views or not all(callable(view) for view in views.values()):
            raise ArgumentError(f"views() of {type(self).__name__} gave {views!r}; it must give at least one named function")
        return views


def guards_of(target: Target) -> tuple[Defence, ...]:
    """The defences that guard a target, in the order in which an input meets them; none where nothing guards it."""
    found, fn = [], target.fn
    while isinstance(fn, partial) and fn.func is _chained:
        found.append(fn.args[0])
        fn = fn.args[1]
    return tuple(found)


def _chained(first: Fn, then: Fn, x: Tensor) -> Any:  # Any: what a target returns
    """A module-level function in a partial can be pickled, and looked into for what stands behind it."""
    return then(first(x))


def _name(mine: str, theirs: str, views: int) -> str:
    return mine if views == 1 else f"{mine}/{theirs}"


@final
class _Both(nn.Module):
    """A defence and what stands behind the target, so that both are held."""

    def __init__(self, parts: Iterator[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.training = self.parts.training = False  # boxes have no mode: only what is in them may raise a flag


def _both(defence: Defence, module: nn.Module | None) -> nn.Module:
    return defence if module is None else _Both(iter((defence, module)))
