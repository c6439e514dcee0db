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
    """Minimises the linearised loss over the threat set: x - eps * sign(grad) for Linf, clamped to the box.

    Targeted FGSM is FGSM with `goal=ClassifyAs()`. It is the weakest gradient attack: resisting it alone is no evidence of
    robustness.

    Source: Goodfellow et al. 2015, section 4 (https://arxiv.org/abs/1412.6572), there for Linf only.
    """

    def run(self, problem: Problem) -> Tensor:
        """One gradient, one step."""
        _, grad = problem.loss_and_grad(problem.x)
        return problem.threat.steepest(-grad, problem.x)
