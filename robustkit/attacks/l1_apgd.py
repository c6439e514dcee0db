"""Auto-PGD in L1: sparse steps, as sparse as the best point so far tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.tensors import as_rows, flatten_rows
from robustkit.attacks._apgd import Point, RestartedAttack, Walk, per_example
from robustkit.problem import Problem
from robustkit.threats import L1, Threat

__all__ = ["L1APGD"]

_WINDOW = 25  # a checkpoint after each 1 / 25 of the steps
_FEWER = 1.5  # a step changes so many times fewer coordinates than the best point
_SPARSER = 0.95  # from such a ratio of changed coordinates on the search starts anew
_SHORTEST = 10  # parts of the budget


@final
@dataclass(frozen=True)
class L1APGD(RestartedAttack):
    """Steps along few coordinates, projected on ball and box at once; how many and how far is chosen on the way.

    While the best point of an example keeps getting sparser, its steps have the length of the whole budget and go on from
    that point; else they get shorter.

    Attributes:
        steps: Number of steps of a run. Each is one pass through the model, forward and back, and the start is one more.
        loss: What is followed in the place of the goal's own loss: "cross-entropy", "margin", "dlr", or "targeted-dlr" for
            runs towards one part of the goal after another. A goal that has but one loss keeps to it, and a note says so.
        restarts: Runs along each loss.
        targets: How many parts of the goal, the likeliest at the unchanged input, "targeted-dlr" tries.

    Source: Croce & Hein 2021, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", the single-radius
        form of the attack (https://arxiv.org/abs/2103.01208): 100 steps. The start is a normal change, projected; a uniform
        point of the ball is a worse one. First a fifth of the coordinates, later two thirds of those in which the best point
        differs from x; lengths from eps down to eps / 10, divided by 1.5.

    Unlike there, the steps up to the first checkpoint, and of every other window after it, pass over coordinates at the edge
    of the box that could only leave it: all places may go to such, and then nothing moves. The steps in between push these
    too, as printed: what the change itself has brought to the edge stays there, where the projection would take from it. The
    runs at three and two times the budget, which the authors put before, are left out: an attack does not leave its threat.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (L1,)

    def descend(self, problem: Problem, number: int) -> Point:
        """The loop of the paper."""
        x, threat = problem.x, problem.threat
        longest, changed = per_example(threat.budget, x), per_example(flatten_rows(x).shape[1], x)
        start = threat.project(x + problem.noise("start", number).normal(*x.shape[1:]).to(x), x)
        walk, length, count, window = Walk(problem, start), longest, changed / 5, max(1, self.steps // _WINDOW)
        for step in problem.steps(self.steps):
            here = walk.here
            way = -here.grad if step // window % 2 else threat.movable(-here.grad, here.x_adv)
            walk.to(threat.project(here.x_adv + _sparse_step(way, length, count), x))
            if (step + 1) % window == 0:
                before, changed = changed, flatten_rows(walk.best.x_adv != x).sum(1).double()
                sparser = changed < _SPARSER * before
                length = torch.where(sparser, longest, torch.maximum(length / _FEWER, longest / _SHORTEST))
                count = changed / _FEWER
                walk.back(sparser)
        return walk.best


def _sparse_step(way: Tensor, length: Tensor, count: Tensor) -> Tensor:
    """A change of the given length, (N,), shared equally by the `count` coordinates, (N,), that count most in `way`.

    Counts are rounded up; of equal coordinates at the limit all take part.
    """
    weight = flatten_rows(way).abs()
    least = weight.sort(1, descending=True).values.gather(1, (count.ceil().long() - 1).clamp(min=0).unsqueeze(1))
    sign = way.sign() * (weight >= least).reshape(way.shape)
    return sign * as_rows(length / flatten_rows(sign).abs().sum(1).clamp(min=1), way)
