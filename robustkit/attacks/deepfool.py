"""The nearest border of the linearised model, again and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._tensors import as_rows, dot, over
from robustkit.attack import Attack
from robustkit.attacks._checks import at_least, not_negative
from robustkit.goals import Out
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["DeepFool"]


@final
@dataclass(frozen=True)
class DeepFool(Attack):
    """Each step goes straight to the nearest border that a linear model would have, and a little further.

    It looks for a small change, not for the largest loss inside a budget: `keep="smallest"` shows what it is made for.
    Every goal is served through its parts (one for each other class) and their edges. Unlike in the paper each point is
    brought into the threat set, so that a border beyond the budget is approached as far as the budget goes.

    Attributes:
        steps: The most steps; an example stops at the first success.
        candidates: How many parts of the goal, the likeliest ones, compete for the nearest border; each costs a gradient.
        overshoot: By which share the whole change is made longer than the linear model asks for.

    Source: Moosavi-Dezfooli, Fawzi & Frossard 2016, algorithm 2 and, for Linf, equations 10 to 12
    (https://arxiv.org/abs/1511.04599): 50 steps, 10 candidates, overshoot 0.02.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, candidates=self.candidates)
        not_negative(overshoot=self.overshoot)

    def run(self, problem: Problem) -> Tensor:
        """The loop of the paper."""
        x, threat = problem.x, problem.threat
        change, x_adv = torch.zeros_like(x), x
        left = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in problem.steps(self.steps):
            rows = (left & problem.open).nonzero().squeeze(1)
            if not len(rows):
                break
            step, left[rows] = nearest_border(problem[rows], x_adv[rows], self.candidates)
            change[rows] = change[rows] + step
            x_adv = threat.project(x + (1 + self.overshoot) * change, x)
        return x_adv


def nearest_border(problem: Problem, x_adv: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The shortest step from `x_adv` to a border of the goal, were the model linear, measured as the threat measures.

    Returns:
        The step, (N, *S), zero where the goal is reached or no border is in sight; and whether it is neither, (N,) bool.
    """

    def edges(out: Out, ref: Tensor) -> Iterator[Tensor]:
        return (goal.edge(out, part) for goal, part in problem.goal.parts(out, ref)[:candidates])

    step = zero = torch.zeros_like(x_adv)
    shortest = torch.full((len(problem),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
    reached = torch.zeros_like(problem.open)
    for edge, grad in problem.gradients(x_adv, edges):
        unit = problem.threat.move(-grad, zero, problem.x, 1.0)
        # A tie is a border that one has to leave; where there is no gradient the quotient is infinite or no number.
        length = torch.where(edge == 0, torch.finfo(edge.dtype).resolution, edge / -dot(grad, unit))
        reached |= edge < 0
        shorter = (length > 0) & (length < shortest)
        shortest = torch.where(shorter, length, shortest)
        step = torch.where(over(shorter, x_adv), as_rows(length, x_adv) * unit, step)
    going = ~reached & (shortest < torch.inf)
    return torch.where(over(going, x_adv), step, 0), going
