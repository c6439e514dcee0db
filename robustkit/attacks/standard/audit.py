"""Looks for the ways in which a model can look robust without being so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit._engine.field_checks import positive
from robustkit.attack import Attack
from robustkit.attacks.standard import attack_checks as trials
from robustkit.attacks.standard import gradient_checks as probes
from robustkit.problem import Problem

__all__ = ["Audit"]


@final
@dataclass(frozen=True)
class Audit(Attack):
    """Not to break examples, but to find out whether a number may be believed; what it breaks counts all the same.

    Each probe testifies in how many of so many cases something was so; `robustkit.flags` says when that is an alarm. Which
    examples are asked, each decides by its own lot.

    Attributes:
        share: Of the open examples, the share of which the dear questions are asked.
    """

    share: float = 0.25

    def __post_init__(self) -> None:
        positive(share=self.share)

    def run(self, problem: Problem) -> Tensor:
        """One probe after another."""
        probes.answers(problem)
        probes.ordinary(problem)
        probes.agreement(problem, probes.chosen(problem, "agreement", 1.0))
        probes.small_steps(problem, probes.chosen(problem, "small", 1.0))
        trials.raw_runs(problem, probes.chosen(problem, "raw", self.share, left=False))
        trials.unbounded(problem, probes.chosen(problem, "unbounded", self.share))
        trials.binarised(problem, probes.chosen(problem, "binarised", self.share, left=False))
        trials.survivors(problem, self.share)
        return problem.best
