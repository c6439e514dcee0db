"""The fast gradient sign method: one step of the whole budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit.attack import Attack
from robustkit.problem import Problem

__all__ = ["FGSM"]


@final
@dataclass(frozen=True)
class FGSM(Attack):
    """The point of the threat set where the linearised loss is smallest: x - eps * sign(grad) for Linf, cut to the box.

    Targeted FGSM is FGSM with `goal=ClassifyAs()`. It is the weakest gradient attack there is: a model that resists it
    has shown little.

    Source: Goodfellow et al. 2015, section 4 (https://arxiv.org/abs/1412.6572); unlike there, for every threat.
    """

    def run(self, problem: Problem) -> Tensor:
        """One gradient, one step."""
        _, grad = problem.loss_and_grad(problem.x)
        return problem.threat.steepest(-grad, problem.x)
