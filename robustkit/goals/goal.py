"""WHAT SUCCESS IS: a loss that attacks descend, and the fact that they want to bring about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from robustkit.losses import Loss

__all__ = ["Goal", "Out"]

Out = Any  # what a target returns: a tensor (N, ...) or a tuple of such; only the goal knows which


class Goal(ABC):
    """What an adversary wants of a model's output, compared with a reference.

    The reference `ref` comes with the call: labels, wanted classes, embeddings, images, one row an example. Goals hold
    no data, so they index, batch and print. Concrete goals are frozen dataclasses.

    Attributes:
        met_before: True where an input on which the goal holds without any change counts as a success of size zero
            (a classifier that is wrong anyway). Other goals attack such inputs like all others.
        vanishes_at_x: True where the gradient is zero at the unchanged input by mathematics (a distance to the
            output itself), so that a zero there is no sign of a masked gradient. Such goals need a random start.
    """

    counts_if_already_true: ClassVar[bool] = False
    vanishes_at_x: ClassVar[bool] = False

    @abstractmethod
    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """What attacks descend, (N,)."""

    @abstractmethod
    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Whether the goal is reached, (N,) bool."""

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """Sub-goals any of which is enough, each with its reference (N,), likeliest first; by default the goal itself.

        Attacks that try one direction after another work through this, so that none needs to know what a label is.
        """
        return [(self, ref)]

    def with_surrogate(self, surrogate: Loss) -> Goal:
        """The same goal with another loss to follow; by default itself, which knows but one."""
        return self

    def predicted_ref(self, out: Out, ref: Tensor) -> Tensor:
        """The reference with the model's own answer `out` in the place of the truth; by default `ref`, which is no truth.

        What is learned against it asks for a change of the answer, whether the answer was right or wrong.
        """
        return ref

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """How far the output is from the goal, (N,): above zero before it is reached, zero at the border; by default the loss.

        For attacks that look for the border. Goals whose loss is not zero there have to say something else.
        """
        return self.loss(out, ref)

    def __repr__(self) -> str:
        """The recipe: functions by their names, so that it reads the same in every process."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        given = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values]
        return f"{type(self).__name__}({', '.join(given)})"

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse an output or a reference that this goal cannot read; called once a run, so it may be thorough.

        Raises:
            ShapeError: With what came and what was expected.
        """
        return
