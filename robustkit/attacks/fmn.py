"""Fast minimum-norm attack: a ball around each example that follows the border."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import abs_max, expand_rows
from robustkit.attack import Attack
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._cosine import cosine
from robustkit.attacks._fmn import Balls, SuccessCheck
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["FMN"]

_LAST_ALPHA, _LAST_GAMMA = 0.01, 0.001  # the first as a share of alpha, both as in the authors' implementations


@final
@dataclass(frozen=True)
class FMN(Attack):
    """Steps down to the border inside a ball that shrinks after each success and grows after each failure.

    It looks for a small change, not for the largest loss inside a budget: `keep="smallest"` shows what it is made for, and
    the sizes that come back are the whole robustness curve below the budget. Each step is one forward and one gradient;
    where the goal is reached for the first time the deployed function is asked once more, and from then on only if it
    contradicted the view.

    Taken from the paper: the signed distance to the border as the loss, for any goal its edge; the size of the ball,
    before the first success by the linear distance to the border in the dual norm, later by the share gamma, and never
    above the smallest success; for Pixels whole numbers that change by at least one; cosine annealing of alpha and gamma;
    projection on ball and box after each step.

    Here it is otherwise:

    - A success beyond the budget is worth nothing, but balls may exceed it: the way along the border starts outside.
    - A step is alpha of the way that a linear model would ask for: from x to the best point of the present ball inside the
      box (there: alpha in input units along the gradient, whatever the norm, the range of the inputs and the size of the
      ball). Without a box this is the direction of the gradient for L2, as there, and its signs for Linf. Coordinates that
      the best point leaves as they are go back towards x by the same share.
    - Before the first success the ball is larger by gamma than the linear distance: exactly on the border nothing is won.
      That distance leaves out coordinates which the box holds fast.
    - Pixels counts locations, all channels of one together (there: every channel of each).
    - An example without any gradient at x itself goes on from a random point of the threat set.
    - gamma starts at 0.2 (there: 0.05).

    Attributes:
        steps: Number of steps.
        alpha: The share of the way that the first step goes; a hundredth of it is left in the end.
        gamma: The share by which the first balls grow and shrink; 0.001 is left in the end.

    Source: Pintor, Roli, Brendel & Biggio 2021, algorithm 1 (https://arxiv.org/abs/2102.12827).
    """

    minimum_norm: ClassVar[bool] = True

    steps: int = 100
    alpha: float = 0.5
    gamma: float = 0.2

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(alpha=self.alpha, gamma=self.gamma)
        if self.gamma >= 1:
            raise ArgumentError(f"gamma={self.gamma!r} must be below one: a ball cannot shrink by more than itself")

    def run(self, problem: Problem) -> Tensor:
        """The loop of the paper."""
        x = x_adv = problem.x
        border = problem.with_surrogate(DecisionBoundary(problem.goal), problem.ref)
        claims, balls = SuccessCheck(problem), Balls(problem.threat, x)
        for k in problem.steps(self.steps):
            edge, grad = border.loss_and_grad(x_adv)
            reached = claims.checked(x_adv, edge < 0)
            ball = balls.next(x_adv, edge, grad, reached, self.annealed(self.gamma, _LAST_GAMMA, k))
            share = self.annealed(self.alpha, _LAST_ALPHA * self.alpha, k)
            lost = (abs_max(grad) == 0) & (abs_max(x_adv - x) == 0)
            x_adv = ball.project(x_adv + share * _way(ball, -grad, x_adv, x), x)
            if lost.any():
                x_adv = torch.where(expand_rows(lost, x), problem.start(), x_adv)
        return x_adv

    def annealed(self, first: float, last: float, k: int) -> float:
        """Half a period of the cosine, from `first` at k = 0 towards `last`."""
        return last + (first - last) * cosine(k, self.steps)


def _way(ball: Threat, grad: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
    """What the best point of the ball for the linear function `grad` changes, and back to x where it changes nothing."""
    change = ball.steepest(grad, x) - x
    return torch.where(change == 0, x - x_adv, change)
