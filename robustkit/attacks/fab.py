"""The fast adaptive boundary attack: a walk along the decision boundary towards the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative, positive
from robustkit._engine.tensors import as_rows, dot
from robustkit.attack import Attack
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._descent import BestPoint
from robustkit.attacks._hyperplane import move_length, project_to_hyperplane
from robustkit.errors import ArgumentError
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["FAB", "boundary_walk"]

_MIN_LENGTH = 1e-8  # lower limit on the length of a move, which is divided by
_COMPACT_BELOW = 0.8  # solved examples leave the batch once fewer than this share of it are unsolved


@final
@dataclass(frozen=True)
class FAB(Attack):
    """Projects both the iterate and x onto the boundary of the linearised model, and steps to a point between the two.

    It minimises the size of the perturbation, so it is at its best under `keep="smallest"`. Iterates may lie far outside the
    budget. This is its strength: where a model is flat around x, as networks with thresholds in their first layer are, only
    the gradient at the boundary shows a way along it.

    Attributes:
        steps: Steps of the walk along the boundary of one part of the goal; each is one forward and one backward pass.
        parts: Number of parts of the goal, likeliest at x first; each has a walk of its own, which starts at x.
        bias: Largest weight of the projection of x in a step (alpha_max).
        overshoot: Factor on moves onto the boundary (eta).
        pull: Share of the perturbation that is kept after a success (beta).

    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", algorithm 1
        (https://arxiv.org/abs/1907.02044), in its targeted form. There: 100 steps, pull 0.9. Here the backward step and the
        next projection use the gradient at the successful point, so that a step is one pass and not two; and there is no
        final search, because the steps after a backward step find the boundary again.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)
    minimum_norm: ClassVar[bool] = True

    steps: int = 50
    parts: int = 9
    bias: float = 0.1
    overshoot: float = 1.05
    pull: float = 0.7

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, parts=self.parts)
        positive(pull=self.pull)
        not_negative(bias=self.bias, overshoot=self.overshoot)
        for name, value, in_range in (
            ("bias", self.bias, self.bias <= 1),
            ("pull", self.pull, self.pull < 1),
            ("overshoot", self.overshoot, self.overshoot >= 1),
        ):
            if not in_range:
                raise ArgumentError(
                    f"{name}={value!r} is out of its range: bias is at most 1, pull below 1, overshoot at least 1"
                )

    def run(self, problem: Problem) -> Tensor:
        """One boundary walk for each part of the goal, from x."""
        best = BestPoint(problem.x)
        goal = problem.goal.with_surrogate_loss(margin)
        for part, ref in goal.parts(problem.predict(problem.x), problem.ref)[: self.parts]:
            best.update(*boundary_walk(problem.with_surrogate_loss(DecisionBoundary(part), ref), self.steps, self))
        return problem.threat.project(best.x_adv, problem.x)


def boundary_walk(problem: Problem, steps: int, config: FAB) -> tuple[Tensor, Tensor]:
    """The smallest perturbations beyond the boundary on a walk along it: points (N, *S) and sizes (N,); x and inf if none.

    The loss of the problem must be a signed margin: positive before the boundary, zero on it, negative beyond it.
    """
    best, rows = BestPoint(problem.x), torch.arange(len(problem), device=problem.x.device)
    x_adv = problem.x
    for _ in problem.steps(steps):
        unsolved = problem.unsolved.nonzero().squeeze(1)
        if len(unsolved) < _COMPACT_BELOW * len(rows):
            problem, rows, x_adv = problem[unsolved], rows[unsolved], x_adv[unsolved]
        x, threat = problem.x, problem.threat
        boundary_margin, grad = problem.loss_and_grad(x_adv)
        beyond, size = boundary_margin < 0, move_length(threat, x_adv - x)
        best.update(x_adv, torch.where(beyond, size, torch.inf), rows)
        # Backward step: iterates beyond the boundary go part of the way to x.
        back = beyond.to(x) * (1 - config.pull)
        change_to_x = dot(grad, x - x_adv)  # of the linear model
        start = torch.lerp(x_adv, x, as_rows(back, x))
        from_start = project_to_hyperplane(threat, start, grad, boundary_margin + back * change_to_x)
        from_x = project_to_hyperplane(threat, x, grad, boundary_margin + change_to_x)
        start_length, x_length = (move_length(threat, move).clamp(min=_MIN_LENGTH) for move in (from_start, from_x))
        alpha = as_rows((start_length / (start_length + x_length)).clamp(max=config.bias), x)
        x_adv = threat.clamp(torch.lerp(start, x, alpha) + config.overshoot * torch.lerp(from_start, from_x, alpha))
    return best.x_adv, best.loss
