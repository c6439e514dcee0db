"""One change for all examples, from the nearest borders of one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative
from robustkit.attacks.deepfool import to_the_border
from robustkit.attacks.universal._universal import UniversalAttack, rate, shuffled
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["UniversalDeepFool"]


@final
@dataclass(frozen=True)
class UniversalDeepFool(UniversalAttack):
    """For every example that the change does not fool yet, DeepFool from there; what it adds is added to the change.

    With `batch=1` this is the algorithm of the paper. With more, the examples of a batch are taken from the same change and
    what they add is summed up before the projection: another order of the same operations, much faster, and on small nets
    stronger too. Unlike in the paper every point is cut to the box, as the images that a model is shown are, and of the
    changes after each pass the best one is returned.

    Attributes:
        fooling: The share of examples that is enough, 1 - delta of the paper.
        passes: The most passes over the examples.
        batch: How many examples are taken from the same change.
        steps: The most steps of DeepFool for an example.
        candidates: How many parts of the goal compete in each of them, the likeliest ones.
        overshoot: By which share DeepFool goes further than to the border.

    Source: Moosavi-Dezfooli, Fawzi, Fawzi & Frossard 2017, algorithm 1 (https://arxiv.org/abs/1610.08401): fooling 0.8, 10
    candidates, 50 steps there.
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
        """Pass after pass, until enough are fooled."""
        ball, delta = problem.threat.free, torch.zeros_like(problem.x[:1])
        zero = best = delta
        reached = rate(problem, delta)
        for number in range(self.passes):
            if reached >= self.fooling:
                break
            for some in shuffled(problem, self.batch, number):
                delta = ball.project(delta + self._needed(some, delta), zero)
            now = rate(problem, delta)
            if now >= reached:
                best, reached = delta, now
        return best

    def _needed(self, some: Problem, delta: Tensor) -> Tensor:
        """What the examples need besides `delta`, summed up, (1, *S): nothing where the goal is reached."""
        total = torch.zeros_like(delta)
        for part in some.batches(some.batch_size):

            def place(rows: Tensor, change: Tensor, part: Problem = part) -> Tensor:
                return part.threat.clamp(part.x[rows] + delta + change)

            change = to_the_border(part, place, self.steps, self.candidates, self.overshoot)
            total = total + change.sum(0, keepdim=True)
        return total
