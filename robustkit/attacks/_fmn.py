"""What FMN keeps of each example: a ball whose size follows the border, and whether the view of the model can be believed."""

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

__all__ = ["Balls", "SuccessCheck"]


@final
class Balls:
    """A ball for each of N examples: it shrinks where the goal was reached and grows where it was not, up to the budget.

    Attributes:
        size: The present sizes, (N,) float64.
        best: The sizes of the smallest changes that reached the goal, (N,) float64, infinite before the first.
    """

    def __init__(self, threat: Threat, x: Tensor) -> None:
        self._threat, self._x, self._counts = threat, x, isinstance(threat, Pixels)
        budget = torch.as_tensor(threat.eps, dtype=torch.float64, device=x.device).expand(len(x))
        # Beyond the budget too: where a model is flat around x, only the border itself shows the way along it.
        self._most = budget.clamp(max=x[0, 0].numel()).floor() if self._counts else _whole(threat, x, budget)
        # Below this a change is lost in rounding: the start of an example that sits on the border.
        self._least = torch.minimum(4 * threat.slack(x), self._most).clamp(min=1.0 if self._counts else 1e-12)
        self.size, self.best = torch.ones_like(self._most), torch.full_like(self._most, torch.inf)

    def next(self, x_adv: Tensor, edge: Tensor, grad: Tensor, reached: Tensor, gamma: float) -> Threat:
        """The ball of the next step: lines 6 to 12 of algorithm 1, or their form for L0.

        Args:
            x_adv: The present points, (N, *S).
            edge: How far the goal is there, (N,).
            grad: The gradient of that, (N, *S).
            reached: Where the goal is reached, (N,) bool.
            gamma: By which share sizes change.
        """
        change = self._threat.size(x_adv, self._x)
        self.best = torch.where(reached, torch.minimum(self.best, change), self.best)
        less, more = self.size * (1 - gamma), self.size * (1 + gamma)
        if self._counts:
            less, more = less.floor(), torch.maximum(self.size + 1, more.floor())
        else:
            more = torch.where(self.best < torch.inf, more, (change + self._distance(x_adv, edge, grad)) * (1 + gamma))
        size = torch.where(reached, torch.minimum(less, self.best), more).nan_to_num(math.inf)
        self.size = torch.minimum(torch.maximum(size, self._least), self._most)
        return replace(self._threat, eps=self.size)

    def _distance(self, x_adv: Tensor, edge: Tensor, grad: Tensor) -> Tensor:
        """How far the border would be if the model were linear, (N,) float64, with the coordinates that the box leaves free."""
        dual = 1 if isinstance(self._threat, Linf) else 2 if isinstance(self._threat, L2) else math.inf
        return edge.double().abs() / norm(self._threat.movable(-grad, x_adv), dual)


def _whole(threat: Threat, x: Tensor, budget: Tensor) -> Tensor:
    """The size of a ball that holds the whole box, (N,); without a box, a hundred budgets."""
    if threat.bounds is None:
        return 100 * budget
    return torch.full_like(budget, float(max_threat(threat, x).eps))


@final
class SuccessCheck:
    """What the adversary's view says of success, compared with the deployed function where that may tell otherwise."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._asked, self._doubted = (torch.zeros_like(problem.unsolved) for _ in range(2))

    def checked(self, x_adv: Tensor, reached: Tensor) -> Tensor:
        """`reached` (N,) bool, corrected: the first claim of each example is looked at, and every one if that was wrong."""
        at = (reached & (self._doubted | ~self._asked)).nonzero().squeeze(1)
        if not len(at):
            return reached
        true = self._problem[at].reliably_reached(x_adv[at])
        self._asked[at] = True
        self._doubted[at] |= ~true
        return reached.index_put((at,), true)
