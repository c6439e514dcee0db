"""Momentum iterative FGSM."""

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
    """Iterative FGSM along an accumulated, L1-normalised gradient: persistent directions add up, oscillations cancel.

    Attributes:
        steps: Number of steps.
        reach: Length of the whole path in budgets: each step is reach / steps of the budget.
        decay: Weight of the accumulated gradient (mu of the paper); 0 is iterative FGSM.

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
        """Algorithm 1."""
        x, threat = problem.x, problem.threat
        x_adv, momentum = x, torch.zeros_like(x)
        for _ in problem.steps(self.steps):
            _, grad = problem.loss_and_grad(x_adv)
            momentum = self.decay * momentum + grad / as_rows(norm(grad, 1).clamp(min=torch.finfo(grad.dtype).tiny), grad)
            x_adv = threat.project(threat.step(-momentum, x_adv, x, self.reach / self.steps), x)
        return x_adv
