"""DeepFool: steps to the nearest decision boundary of the linearised model."""

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

__all__ = ["DeepFool", "cross_boundary", "nearest_boundary"]

_GROWTH = 1.1  # factor on a perturbation that crosses the boundary of the view but not that of the deployed function


@final
@dataclass(frozen=True)
class DeepFool(Attack):
    """Each step goes to the nearest decision boundary of the linearised model, and a little beyond it.

    It minimises the size of the perturbation, so it is at its best under `keep="smallest"`. Every goal is supported through
    its parts (one per other class) and their boundary margins. Unlike in the paper, each point is projected onto the threat
    set: a boundary beyond the budget is approached as far as the budget allows.

    Attributes:
        steps: Largest number of steps; an example stops at its first success.
        candidates: Number of parts of the goal, likeliest first, among which the nearest boundary is chosen; each costs a
            backward pass.
        overshoot: The share by which the whole perturbation is lengthened (eta of the paper).

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
        """Algorithm 2, with each point projected onto the threat set."""
        x, threat = problem.x, problem.threat

        def apply(rows: Tensor, perturbation: Tensor) -> Tensor:
            return threat[rows].project(x[rows] + perturbation, x[rows])

        perturbation = cross_boundary(problem, apply, self.steps, self.candidates, self.overshoot)
        return threat.project(x + perturbation, x)


def cross_boundary(
    problem: Problem, apply: Callable[[Tensor, Tensor], Tensor], steps: int, candidates: int, overshoot: float
) -> Tensor:
    """The perturbations that move the examples across the nearest decision boundaries, (N, *S).

    An example that reaches the goal in the adversary's view, but not on the deployed function (or not on most draws of it),
    is not done: its whole perturbation is enlarged.

    Args:
        problem: The examples.
        apply: Maps rows (M,) and perturbations (M, *S) to points (M, *S).
        steps: Largest number of steps.
        candidates: Number of parts of the goal among which the nearest boundary is chosen.
        overshoot: The share by which the perturbations are lengthened.
    """
    perturbation = torch.zeros_like(problem.x)
    rows = torch.arange(len(problem), device=problem.x.device)
    for _ in problem.steps(steps):
        rows = rows[problem.unsolved[rows]]
        if not len(rows):
            break
        active, points = problem[rows], apply(rows, (1 + overshoot) * perturbation[rows])
        step, has_boundary, reached = nearest_boundary(active, points, candidates)
        perturbation[rows] += step
        unconfirmed = reached.nonzero().squeeze(1)
        unconfirmed = unconfirmed[~active[unconfirmed].reliably_reached(points[unconfirmed])]
        perturbation[rows[unconfirmed]] *= _GROWTH
        continues = has_boundary & ~reached
        continues[unconfirmed] = True
        rows = rows[continues]
    return (1 + overshoot) * perturbation


def nearest_boundary(problem: Problem, x_adv: Tensor, candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest step from `x_adv` to a decision boundary of the linearised model, in the norm of the threat.

    Unlike in the paper, which has no box, coordinates that the box blocks are left out of the linear model. Otherwise the
    clamp would remove most of a step, and the iterates would approach the boundary without reaching it.

    Returns:
        The step, (N, *S): zero where the goal is reached in the adversary's view, and where no gradient leads to a
        boundary. Whether one does, (N,) bool. Whether the goal is reached in the view, (N,) bool.
    """

    def margins(out: Out, ref: Tensor) -> Iterator[Tensor]:
        return (goal.boundary_margin(out, part) for goal, part in problem.goal.parts(out, ref)[:candidates])

    step = zero = torch.zeros_like(x_adv)
    shortest = torch.full((len(problem),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
    reached = torch.zeros_like(problem.unsolved)
    for margin, grad in problem.gradients(x_adv, margins):
        descent = problem.threat.movable(-grad, x_adv)
        unit = problem.threat.move(descent, zero, problem.x, 1.0)
        # At a tie the point lies on the boundary and has to leave it; without a gradient the quotient is infinite or NaN.
        length = torch.where(margin == 0, torch.finfo(margin.dtype).resolution, margin / dot(descent, unit))
        reached |= margin < 0
        shorter = (length > 0) & (length < shortest)
        shortest = torch.where(shorter, length, shortest)
        step = torch.where(expand_rows(shorter, x_adv), as_rows(length, x_adv) * unit, step)
    has_boundary = shortest < torch.inf
    return torch.where(expand_rows(has_boundary & ~reached, x_adv), step, 0), has_boundary, reached
