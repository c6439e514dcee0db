"""The fast minimum-norm attack: a ball around each example whose size follows the decision boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import abs_max, expand_rows
from robustkit.attack import Attack
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._descent import cosine_decay
from robustkit.attacks._fmn import AdaptiveBalls, SuccessCheck
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["FMN"]

_FINAL_ALPHA, _FINAL_GAMMA = 0.01, 0.001  # the first as a share of alpha; both as in the authors' implementations


@final
@dataclass(frozen=True)
class FMN(Attack):
    """Steps to the decision boundary inside a ball that shrinks after each success and grows after each failure.

    It minimises the size of the perturbation, so it is at its best under `keep="smallest"`: the sizes of its results give
    the whole robustness curve up to the budget. Each step is one forward and one backward pass. The first success of an
    example in the adversary's view costs one more forward pass on the deployed function; later ones only if that failed.

    As in the paper: the loss is the signed margin to the decision boundary, for any goal; the size of the ball is the linear
    distance to the boundary in the dual norm before the first success, then changes by the share gamma, and never exceeds
    the smallest success; for Pixels sizes are integers and change by at least one; alpha and gamma follow a cosine schedule;
    each step is projected onto ball and box.

    Unlike in the paper:

    - A success beyond the budget does not count, but balls may exceed the budget: a way along the boundary starts there.
    - A step covers the share alpha of the way from x to the minimiser of the linearised loss over the current ball and the
      box (there: alpha in input units along the gradient, whatever the norm, the input range and the size of the ball).
      Without a box this is the direction of the gradient for L2, as there, and its sign for Linf. Coordinates that the
      minimiser leaves unchanged move back towards x by the same share.
    - Before the first success the ball is larger than the linear distance by gamma, because a point exactly on the boundary
      is no success. The distance leaves out coordinates that the box blocks.
    - Pixels counts locations, all channels of one together (there: every channel of each).
    - An example whose gradient at x is zero continues from a random point of the threat set.
    - gamma starts at 0.2 (there: 0.05).

    Attributes:
        steps: Number of steps.
        alpha: Step size of the first step, as a share of the way; it falls to a hundredth of that.
        gamma: The share by which the balls grow and shrink at first; it falls to 0.001.

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
            raise ArgumentError(f"gamma={self.gamma!r} must be below one: a ball cannot shrink by more than its size")

    def run(self, problem: Problem) -> Tensor:
        """Algorithm 1."""
        x = x_adv = problem.x
        to_boundary = problem.with_surrogate_loss(DecisionBoundary(problem.goal), problem.ref)
        check, balls = SuccessCheck(problem), AdaptiveBalls(problem.threat, x)
        for step in problem.steps(self.steps):
            margin, grad = to_boundary.loss_and_grad(x_adv)
            success = check.verify(x_adv, margin < 0)
            gamma = self.annealed(self.gamma, _FINAL_GAMMA, step)
            ball = balls.next(x_adv, margin, grad, success, gamma)
            alpha = self.annealed(self.alpha, _FINAL_ALPHA * self.alpha, step)
            without_gradient = (abs_max(grad) == 0) & (abs_max(x_adv - x) == 0)
            x_adv = ball.project(x_adv + alpha * _direction(ball, -grad, x_adv, x), x)
            if without_gradient.any():
                x_adv = torch.where(expand_rows(without_gradient, x), problem.start(), x_adv)
        return x_adv

    def annealed(self, first: float, last: float, step: int) -> float:
        """The cosine schedule, half a period long: `first` at step 0, approaching `last`."""
        return last + (first - last) * cosine_decay(step, self.steps)


def _direction(ball: Threat, grad: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
    """The perturbation of x that maximises the linear function `grad` over the ball; where that is zero, x - x_adv."""
    perturbation = ball.steepest(grad, x) - x
    return torch.where(perturbation == 0, x - x_adv, perturbation)
