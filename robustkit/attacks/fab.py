"""Fast adaptive boundary attack: a walk along the border, from outside, towards the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative, positive
from robustkit._engine.tensors import as_rows, dot, expand_rows
from robustkit.attack import Attack
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._hyperplane import move_length, project_to_hyperplane
from robustkit.errors import ArgumentError
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["FAB", "boundary_walk"]

_TINY = 1e-8  # a move so short has no direction
_CROWDED = 0.8  # of the examples still walk: the others are let go


@final
@dataclass(frozen=True)
class FAB(Attack):
    """Projects onto the border of the linearised model, from the iterate and from x, and goes between the two.

    It looks for a small change, not for the largest loss inside a budget: `keep="smallest"` shows what it is made for. What is
    on the way may lie far outside of the budget. That is its strength: where a model is flat around x, as nets with thresholds
    in their first layer are, only the border itself shows the way along it.

    Attributes:
        steps: Of a walk along the border of one part of the goal; each is one pass, forward and back.
        parts: How many parts of the goal, the likeliest at x, are tried; each has a walk of its own, from x.
        bias: How much of a step goes to the projection of x, at most (alpha_max).
        overshoot: By which factor moves onto the border are made longer (eta).
        pull: Where the goal is reached, the share of the change that is kept (beta).

    Source: Croce & Hein 2020, "Minimally distorted adversarial examples with a fast adaptive boundary attack", algorithm 1
        (https://arxiv.org/abs/1907.02044), in its targeted form. There: 100 steps, pull 0.9. Here the way back and the next
        projection use the gradient at the point that reached the goal, so that a step is one pass and not two, and there is no
        final search: on the way back the next steps find the border.
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
        for name, value, rule in (
            ("bias", self.bias, self.bias <= 1),
            ("pull", self.pull, self.pull < 1),
            ("overshoot", self.overshoot, self.overshoot >= 1),
        ):
            if not rule:
                raise ArgumentError(
                    f"{name}={value!r} is out of its range: bias is at most 1, pull below 1, overshoot at least 1"
                )

    def run(self, problem: Problem) -> Tensor:
        """One walk for each part, from x."""
        x_adv, smallest = problem.x, torch.full((len(problem),), torch.inf, dtype=problem.x.dtype, device=problem.x.device)
        goal = problem.goal.with_surrogate(margin)
        for part, ref in goal.parts(problem.predict(problem.x), problem.ref)[: self.parts]:
            points, size = boundary_walk(problem.with_surrogate(DecisionBoundary(part), ref), self.steps, self)
            nearer = size < smallest
            x_adv, smallest = torch.where(expand_rows(nearer, x_adv), points, x_adv), torch.minimum(size, smallest)
        return problem.threat.project(x_adv, problem.x)


def boundary_walk(problem: Problem, steps: int, how: FAB) -> tuple[Tensor, Tensor]:
    """The nearest points beyond the border that a walk comes to, (N, *S), and how far they are, (N,); x and infinite if none.

    The loss that the problem follows has to be an edge: what it is above, the border is at zero.
    """
    found, rows = problem.x.clone(), torch.arange(len(problem), device=problem.x.device)
    smallest = torch.full((len(problem),), torch.inf, dtype=problem.x.dtype, device=problem.x.device)
    at = problem.x
    for _ in problem.steps(steps):
        still = problem.unsolved.nonzero().squeeze(1)
        if len(still) < _CROWDED * len(rows):
            problem, rows, at = problem[still], rows[still], at[still]
        x, threat = problem.x, problem.threat
        edge, grad = problem.loss_and_grad(at)
        reached, size = edge < 0, move_length(threat, at - x)
        nearer = (reached & (size < smallest[rows])).nonzero().squeeze(1)
        found[rows[nearer]], smallest[rows[nearer]] = at[nearer], size[nearer]
        # The edge of a linear model at two points: at x, and at the iterate, which goes back part of the way if it is beyond.
        drawn = reached.to(x) * (1 - how.pull)
        slope = dot(grad, x - at)
        back = torch.lerp(at, x, as_rows(drawn, x))
        one, two = (
            project_to_hyperplane(threat, back, grad, edge + drawn * slope),
            project_to_hyperplane(threat, x, grad, edge + slope),
        )
        length = [move_length(threat, move).clamp(min=_TINY) for move in (one, two)]
        share = as_rows((length[0] / (length[0] + length[1])).clamp(max=how.bias), x)
        at = threat.clamp(torch.lerp(back, x, share) + how.overshoot * torch.lerp(one, two, share))
    return found, smallest
