"""Iterative FGSM along an average of the gradients so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative, positive
from robustkit._engine.tensors import as_rows, norm
from robustkit.attack import Attack
from robustkit.problem import Problem

__all__ = ["MIFGSM"]


@final
@dataclass(frozen=True)
class MIFGSM(Attack):
    """Iterative FGSM with momentum: directions that persist add up, those that oscillate cancel.

    Attributes:
        steps: Number of steps.
        reach: Length of the whole path in budgets; each step is reach / steps of the budget.
        decay: Weight of the past; 0 is iterative FGSM.

    Source: Dong et al. 2018, algorithm 1 (https://arxiv.org/abs/1710.06081): 10 steps, reach 1, decay 1.
    """

    steps: int = 10
    reach: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(reach=self.reach)
        not_negative(decay=self.decay)

    def run(self, problem: Problem) -> Tensor:
        """The loop of the paper."""
        x, threat = problem.x, problem.threat
        x_adv, velocity = x, torch.zeros_like(x)
        for _ in problem.steps(self.steps):
            _, grad = problem.loss_and_grad(x_adv)
            velocity = self.decay * velocity + grad / as_rows(norm(grad, 1).clamp(min=torch.finfo(grad.dtype).tiny), grad)
            x_adv = threat.project(threat.step(-velocity, x_adv, x, self.reach / self.steps), x)
        return x_adv
