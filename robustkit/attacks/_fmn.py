"""The state of FMN for each example: a ball whose size follows the decision boundary, and checks of claimed successes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from robustkit._engine.tensors import norm
from robustkit.attacks._max_threat import max_threat
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Pixels, Threat

__all__ = ["AdaptiveBalls", "SuccessCheck"]


@final
class AdaptiveBalls:
    """One ball per example: it shrinks after a success and grows after a failure, also beyond the budget.

    Attributes:
        size: The current radii, (N,) float64.
        smallest: The sizes of the smallest successful perturbations, (N,) float64; infinite before the first success.
    """

    def __init__(self, threat: Threat, x: Tensor) -> None:
        self._threat, self._x, self._is_l0 = threat, x, isinstance(threat, Pixels)
        budget = torch.as_tensor(threat.eps, dtype=torch.float64, device=x.device).expand(len(x))
        # The limit is the whole box: where a model is flat around x, only the gradient at the boundary shows the way.
        self._upper = budget.clamp(max=x[0, 0].numel()).floor() if self._is_l0 else _box_radius(threat, x, budget)
        # Smaller perturbations are lost in rounding; this is the radius for an x that lies on the boundary.
        self._lower = torch.minimum(4 * threat.slack(x), self._upper).clamp(min=1.0 if self._is_l0 else 1e-12)
        self.size, self.smallest = torch.ones_like(self._upper), torch.full_like(self._upper, torch.inf)

    def next(self, x_adv: Tensor, margin: Tensor, grad: Tensor, success: Tensor, gamma: float) -> Threat:
        """The ball of the next step: lines 6 to 12 of algorithm 1, or their form for L0.

        Args:
            x_adv: The current iterates, (N, *S).
            margin: Their signed margin to the decision boundary, (N,).
            grad: Its gradient, (N, *S).
            success: Whether the goal is reached, (N,) bool.
            gamma: The share by which radii shrink and grow.
        """
        distance = self._threat.size(x_adv, self._x)
        self.smallest = torch.where(success, torch.minimum(self.smallest, distance), self.smallest)
        shrunk, grown = self.size * (1 - gamma), self.size * (1 + gamma)
        if self._is_l0:
            shrunk, grown = shrunk.floor(), torch.maximum(self.size + 1, grown.floor())
        else:
            to_boundary = (distance + self._linear_distance(x_adv, margin, grad)) * (1 + gamma)
            grown = torch.where(self.smallest < torch.inf, grown, to_boundary)
        size = torch.where(success, torch.minimum(shrunk, self.smallest), grown).nan_to_num(math.inf)
        self.size = torch.minimum(torch.maximum(size, self._lower), self._upper)
        return replace(self._threat, eps=self.size)

    def _linear_distance(self, x_adv: Tensor, margin: Tensor, grad: Tensor) -> Tensor:
        """The distance to the boundary of the linearised model, (N,) float64, along coordinates that the box leaves free."""
        dual = 1 if isinstance(self._threat, Linf) else 2 if isinstance(self._threat, L2) else math.inf
        return margin.double().abs() / norm(self._threat.movable(-grad, x_adv), dual)


def _box_radius(threat: Threat, x: Tensor, budget: Tensor) -> Tensor:
    """The radius of a ball that contains the whole box, (N,); a hundred budgets without a box."""
    if threat.bounds is None:
        return 100 * budget
    return torch.full_like(budget, float(max_threat(threat, x).eps))


@final
class SuccessCheck:
    """Compares success in the adversary's view with success on the deployed function, where they may differ."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._checked, self._view_was_wrong = (torch.zeros_like(problem.unsolved) for _ in range(2))

    def verify(self, x_adv: Tensor, claimed: Tensor) -> Tensor:
        """`claimed`, (N,) bool, corrected by queries: the first claim of each example, and all after a wrong one."""
        rows = (claimed & (self._view_was_wrong | ~self._checked)).nonzero().squeeze(1)
        if not len(rows):
            return claimed
        confirmed = self._problem[rows].reliably_reached(x_adv[rows])
        self._checked[rows] = True
        self._view_was_wrong[rows] |= ~confirmed
        return claimed.index_put((rows,), confirmed)
