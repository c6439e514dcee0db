"""The interface of goals: a loss that attacks minimise, and the condition that counts as success."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

from torch import Tensor

from robustkit.losses import Loss

__all__ = ["Goal", "Out"]

Out = Any  # the output of a target: a tensor (N, ...) or a tuple of such; only the goal interprets it


class Goal(ABC):
    """What the adversary wants of the model's output, relative to a reference.

    The reference `ref` is an argument of every method: labels, target classes, embeddings or images, one row per example.
    Goals hold no data, so they can be used on any batch and printed. Goals are frozen dataclasses.

    Attributes:
        counts_if_already_true: True if an input that reaches the goal without a perturbation counts as a success of size
            zero (a misclassified clean input). Other goals attack such inputs like all others.
        vanishes_at_x: True if the gradient is zero at the clean input by definition (a distance to the clean output), so
            that a zero gradient there does not indicate gradient masking. Such goals need a random start.
    """

    counts_if_already_true: ClassVar[bool] = False
    vanishes_at_x: ClassVar[bool] = False

    @abstractmethod
    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The loss that attacks minimise, (N,)."""

    @abstractmethod
    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Whether the goal is reached, (N,) bool."""

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """Sub-goals, each sufficient for this one, with their references (N,), most likely first; by default the goal itself.

        Attacks with targeted restarts use this instead of labels.
        """
        return [(self, ref)]

    def with_surrogate_loss(self, surrogate: Loss) -> Goal:
        """The same goal with another surrogate loss; by default the goal itself, which has only one loss."""
        return self

    def predicted_ref(self, out: Out, ref: Tensor) -> Tensor:
        """The reference with the model's prediction in place of the true label; by default `ref`, where it is not a label.

        Universal attacks learn against it to change the prediction, whether it was right or wrong.
        """
        return ref

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """The margin to the decision boundary, (N,): positive until the goal is reached, zero on the boundary.

        By default the loss. Goals whose loss is not zero on the boundary have to override it.
        """
        return self.loss(out, ref)

    def __repr__(self) -> str:
        """The fields that are not at their default; functions by name, so that it is the same in every process."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        arguments = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values]
        return f"{type(self).__name__}({', '.join(arguments)})"

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse an output or a reference that this goal cannot interpret; called once per run, so it may be slow.

        Raises:
            ShapeError: The message holds what was given and what was expected.
        """
        return
