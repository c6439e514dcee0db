"""The decision boundary of a goal as something to go to: its distance as the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit.goals import Goal, Out

__all__ = ["DecisionBoundary"]


@final
@dataclass(frozen=True, repr=False)
class DecisionBoundary(Goal):
    """Another goal, whose loss is how far its border is."""

    goal: Goal

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The edge of the goal, (N,)."""
        return self.goal.boundary_margin(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where the goal is reached."""
        return self.goal.success(out, ref)

    @property
    def vanishes_at_x(self) -> bool:  # type: ignore[override]
        """What the goal says of its gradient."""
        return self.goal.vanishes_at_x
