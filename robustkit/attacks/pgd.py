"""Projected gradient descent; without a random start it is iterative FGSM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit._engine.field_checks import at_least, positive, positive_or_none
from robustkit.attack import Attack
from robustkit.problem import Problem

__all__ = ["PGD"]


@final
@dataclass(frozen=True)
class PGD(Attack):
    """Steps against the gradient of the loss, each projected onto the threat set.

    `PGD(random_start=False)` is iterative FGSM, also called BIM (Kurakin et al. 2017, section 2.2).

    Attributes:
        steps: Number of steps.
        reach: Length of the whole path in budgets: each step is reach / steps of the budget. The default path can cross
            the ball from any start, whatever the number of steps.
        step_size: Length of each step in input units; overrides `reach`.
        random_start: Start from a random point of the threat set instead of x.

    Source: Madry et al. 2018, section 2.1 (https://arxiv.org/abs/1706.06083): 40 steps of 0.01 for eps = 0.3.
    """

    steps: int = 40
    reach: float = 2.5
    step_size: float | None = None
    random_start: bool = True

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(reach=self.reach)
        positive_or_none(step_size=self.step_size)

    def run(self, problem: Problem) -> Tensor:
        """The iteration of section 2.1."""
        x, threat = problem.x, problem.threat
        x_adv = problem.start() if self.random_start else x
        for _ in problem.steps(self.steps):
            _, grad = problem.loss_and_grad(x_adv)
            x_adv = threat.project(threat.step(-grad, x_adv, x, self.reach / self.steps, length=self.step_size), x)
        return x_adv
