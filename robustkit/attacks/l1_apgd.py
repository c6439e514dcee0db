"""Auto-PGD for L1: sparse steps, whose sparsity follows that of the best point so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.tensors import as_rows, flatten_rows
from robustkit.attacks._restarted_attack import Point, RestartedAttack, Trajectory, per_example
from robustkit.problem import Problem
from robustkit.threats import L1, Threat

__all__ = ["L1APGD"]

_CHECKPOINTS = 25  # one after each 1 / 25 of the steps
_FACTOR = 1.5  # a step changes fewer coordinates than the best point by this factor; step sizes are divided by it
_SPARSER = 0.95  # ratio of changed coordinates below which the best point counts as sparser than at the last checkpoint
_MIN_STEP = 10  # the smallest step size is the budget divided by this


@final
@dataclass(frozen=True)
class L1APGD(RestartedAttack):
    """Steps along a few coordinates, projected onto the intersection of ball and box, with adaptive sparsity and step size.

    While the best point of an example keeps getting sparser, its steps start there and have the size of the whole budget;
    otherwise they get smaller.

    Attributes:
        steps: Number of steps of a run. Each step, and the start, costs one forward and one backward pass.
        loss: The loss to minimise instead of the goal's own: "cross-entropy", "margin", "dlr", or "targeted-dlr" for runs
            towards one part of the goal after another. A goal that has only one loss keeps it, which is noted.
        restarts: Number of runs along each loss.
        targets: Number of parts of the goal, likeliest at the clean input first, that "targeted-dlr" tries.

    Source: Croce & Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", the single-radius
        form of the attack (https://arxiv.org/abs/2103.01208): 100 steps. The start is normal noise, projected; a uniform
        point of the ball is a worse start. A step changes a fifth of the coordinates at first, later two thirds of those in
        which the best point differs from x; step sizes fall from eps to eps / 10 by factors of 1.5.

    Unlike in the paper, the steps up to the first checkpoint, and in every second window after it, skip coordinates on a
    bound that the step would push outwards: if these took all places of the step, nothing would move. The steps in the other
    windows include them, as printed: this keeps coordinates that the attack moved to a bound there, where the projection
    would otherwise pull them back. The authors' runs at three and two times the budget are left out, because an attack does
    not leave its threat.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (L1,)

    def descend(self, problem: Problem, draw: int) -> Point:
        """The single-radius loop of the paper."""
        x, threat = problem.x, problem.threat
        max_step, changed = per_example(threat.budget, x), per_example(flatten_rows(x).shape[1], x)
        start = threat.project(x + problem.noise("start", draw).normal(*x.shape[1:]).to(x), x)
        trajectory, step_size, count = Trajectory(problem, start), max_step, changed / 5
        window = max(1, self.steps // _CHECKPOINTS)
        for step in problem.steps(self.steps):
            current = trajectory.current
            descent = -current.grad if step // window % 2 else threat.movable(-current.grad, current.x_adv)
            trajectory.move_to(threat.project(current.x_adv + _sparse_step(descent, step_size, count), x))
            if (step + 1) % window == 0:
                changed_before, changed = changed, flatten_rows(trajectory.best.x_adv != x).sum(1).double()
                sparser = changed < _SPARSER * changed_before
                step_size = torch.where(sparser, max_step, torch.maximum(step_size / _FACTOR, max_step / _MIN_STEP))
                count = changed / _FACTOR
                trajectory.return_to_best(sparser)
        return trajectory.best


def _sparse_step(direction: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """A step of L1 norm `length`, (N,), spread equally over the `count`, (N,), largest coordinates of `direction`.

    Counts are rounded up; of equal coordinates at the limit all take part.
    """
    weight = flatten_rows(direction).abs()
    smallest = weight.sort(1, descending=True).values.gather(1, (count.ceil().long() - 1).clamp(min=0).unsqueeze(1))
    sign = direction.sign() * (weight >= smallest).reshape(direction.shape)
    return sign * as_rows(length / flatten_rows(sign).abs().sum(1).clamp(min=1), direction)
