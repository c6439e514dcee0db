"""The universal perturbation of DeepFool: minimal perturbations of one example after another, summed up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative
from robustkit.attacks.deepfool import cross_boundary
from robustkit.attacks.universal._universal import UniversalAttack, shuffled_batches, success_rate
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["UniversalDeepFool"]


@final
@dataclass(frozen=True)
class UniversalDeepFool(UniversalAttack):
    """Runs DeepFool on every example that the perturbation does not fool yet, and adds the result to the perturbation.

    With `batch=1` this is the algorithm of the paper. Otherwise the examples of a batch start from the same perturbation, and
    their results are summed before the projection: much faster, and stronger too on small networks. Unlike in the paper,
    every point is clamped to the box, as a model's inputs are, and the best perturbation of all passes is returned.

    Attributes:
        fooling: The success rate at which the attack stops, 1 - delta of the paper.
        passes: Largest number of passes over the examples.
        batch: Number of examples that start from the same perturbation.
        steps: Largest number of DeepFool steps per example.
        candidates: Number of parts of the goal, likeliest first, among which each step chooses the nearest boundary.
        overshoot: The share by which DeepFool lengthens its perturbations.

    Source: Moosavi-Dezfooli, Fawzi, Fawzi & Frossard 2017, algorithm 1 (https://arxiv.org/abs/1610.08401): fooling 0.8, 10
    candidates, 50 steps.
    """

    fooling: float = 0.8
    passes: int = 10
    batch: int = 64
    steps: int = 3
    candidates: int = 3
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        at_least(1, passes=self.passes, batch=self.batch, steps=self.steps, candidates=self.candidates)
        not_negative(overshoot=self.overshoot)
        if not 0 < self.fooling <= 1:
            raise ArgumentError(f"fooling={self.fooling!r} must be a share above 0 and at most 1, such as 0.8")

    def fit(self, problem: Problem) -> Tensor:
        """Algorithm 1: passes over the examples until enough of them are fooled."""
        ball, delta = problem.threat.free, torch.zeros_like(problem.x[:1])
        zero = best = delta
        best_rate = success_rate(problem, delta)
        for number in range(self.passes):
            if best_rate >= self.fooling:
                break
            for batch in shuffled_batches(problem, self.batch, number):
                delta = ball.project(delta + self._sum_of_updates(batch, delta), zero)
            rate = success_rate(problem, delta)
            if rate >= best_rate:
                best, best_rate = delta, rate
        return best

    def _sum_of_updates(self, problem: Problem, delta: Tensor) -> Tensor:
        """The sum of the perturbations that the examples need besides `delta`, (1, *S); zero for those already fooled."""
        total = torch.zeros_like(delta)
        for part in problem.batches(problem.batch_size):

            def apply(rows: Tensor, update: Tensor, part: Problem = part) -> Tensor:
                return part.threat.clamp(part.x[rows] + delta + update)

            update = cross_boundary(part, apply, self.steps, self.candidates, self.overshoot)
            total = total + update.sum(0, keepdim=True)
        return total
