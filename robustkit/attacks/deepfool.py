"""The nearest border of the linearised model, again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative
from robustkit._engine.tensors import as_rows, dot, expand_rows
from robustkit.attack import Attack
from robustkit.goals import Out
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["DeepFool"]

_FURTHER = 1.1  # by so much a change grows with which the deployed function is not content


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
    minimum_norm: ClassVar[bool] = True

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, candidates=self.candidates)
        not_negative(overshoot=self.overshoot)

    def run(self, problem: Problem) -> Tensor:
        """The loop of the paper, each point inside the threat set."""
        x, threat = problem.x, problem.threat

        def place(rows: Tensor, change: Tensor) -> Tensor:
            return threat[rows].project(x[rows] + change, x[rows])

        change = to_the_border(problem, place, self.steps, self.candidates, self.overshoot)
        return threat.project(x + change, x)


def to_the_border(
    problem: Problem, place: Callable[[Tensor, Tensor], Tensor], steps: int, candidates: int, overshoot: float
) -> Tensor:
    """The changes that bring the examples over the nearest borders, and a little further, (N, *S).

    Where the adversary's view says that the goal is reached and the deployed function does not, or not on most draws, the whole
    change grows: such an example is not done.

    Args:
        problem: The examples.
        place: Where changes lead, rows (M,) and changes (M, *S) -> points (M, *S).
        steps: The most steps.
        candidates: How many parts of the goal compete.
        overshoot: By which share the changes go further.
    """
    change = torch.zeros_like(problem.x)
    left = torch.arange(len(problem), device=problem.x.device)
    for _ in problem.steps(steps):
        left = left[problem.unsolved[left]]
        if not len(left):
            break
        some, points = problem[left], place(left, (1 + overshoot) * change[left])
        step, seen, reached = nearest_border(some, points, candidates)
        change[left] += step
        early = reached.nonzero().squeeze(1)
        early = early[~some[early].reliably_reached(points[early])]
        change[left[early]] *= _FURTHER
        going = seen & ~reached
        going[early] = True
        left = left[going]
    return (1 + overshoot) * change


def nearest_border(problem: Problem, x_adv: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest step from `x_adv` to a border of the goal, were the model linear, measured as the threat measures.

    Coordinates that the box holds fast do not count: unlike in the paper, which knows no box, the border is sought with the
    others. Otherwise most of a step would be cut off, and the border come nearer for ever.

    Returns:
        The step, (N, *S), zero where the view says that the goal is reached, or where no border is in sight; whether one is,
        (N,) bool; whether it says so, (N,) bool.
    """

    def edges(out: Out, ref: Tensor) -> Iterator[Tensor]:
        return (goal.boundary_margin(out, part) for goal, part in problem.goal.parts(out, ref)[:candidates])

    step = zero = torch.zeros_like(x_adv)
    shortest = torch.full((len(problem),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
    reached = torch.zeros_like(problem.unsolved)
    for edge, grad in problem.gradients(x_adv, edges):
        down = problem.threat.movable(-grad, x_adv)
        unit = problem.threat.move(down, zero, problem.x, 1.0)
        # A tie is a border that one has to leave; where there is no gradient the quotient is infinite or no number.
        length = torch.where(edge == 0, torch.finfo(edge.dtype).resolution, edge / dot(down, unit))
        reached |= edge < 0
        shorter = (length > 0) & (length < shortest)
        shortest = torch.where(shorter, length, shortest)
        step = torch.where(expand_rows(shorter, x_adv), as_rows(length, x_adv) * unit, step)
    seen = shortest < torch.inf
    return torch.where(expand_rows(seen & ~reached, x_adv), step, 0), seen, reached
