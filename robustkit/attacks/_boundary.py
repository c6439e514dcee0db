"""The decision boundary of a goal as a goal: its loss is the signed margin to the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit.goals import Goal, Out

__all__ = ["DecisionBoundary"]


@final
@dataclass(frozen=True, repr=False)
class DecisionBoundary(Goal):
    """Wraps a goal: same success, but the loss is the goal's boundary margin, which is zero on the decision boundary."""

    goal: Goal

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The boundary margin of the goal, (N,): positive before the boundary, negative beyond it."""
        return self.goal.boundary_margin(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Whether the wrapped goal is reached, (N,) bool."""
        return self.goal.success(out, ref)

    @property
    def vanishes_at_x(self) -> bool:  # type: ignore[override]
        """Whether the gradient of the wrapped goal vanishes at x."""
        return self.goal.vanishes_at_x
