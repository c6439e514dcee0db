"""Looks for the ways in which a model can look robust without being robust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit._engine.field_checks import positive
from robustkit.attack import Attack
from robustkit.attacks.standard import attack_checks, gradient_checks
from robustkit.problem import Problem

__all__ = ["Audit"]


@final
@dataclass(frozen=True)
class Audit(Attack):
    """Checks whether the robust accuracy of a run can be believed. Examples that a check breaks count as broken.

    Each check records in how many of how many cases it was positive; `robustkit.flags` decides when this raises a flag. The
    examples of a check are sampled independently of each other.

    Attributes:
        share: The share of the examples on which the expensive checks are run.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        positive(share=self.share)

    def run(self, problem: Problem) -> Tensor:
        """Run the checks one after another."""
        sample = gradient_checks.sample_rows
        gradient_checks.check_outputs(problem)
        gradient_checks.check_input_range(problem)
        gradient_checks.check_gradients(problem, sample(problem, "agreement", 1.0))
        gradient_checks.check_derivative(problem, sample(problem, "small", 1.0))
        attack_checks.check_monotonicity(problem, sample(problem, "raw", self.share, unsolved_only=False))
        attack_checks.check_unbounded(problem, sample(problem, "unbounded", self.share))
        attack_checks.check_binarised(problem, sample(problem, "binarised", self.share, unsolved_only=False))
        attack_checks.check_gradient_free(problem, self.share)
        return problem.best
