"""Search for the shortest ray to another decision, by the decisions alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import abs_max, expand_rows, flatten_rows
from robustkit.attack import Attack
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["RayS"]

_FAR = 1000.0  # budgets that a ray is followed where no box ends it


@final
@dataclass(frozen=True)
class RayS(Attack):
    """Rays from x along vectors of signs; blocks of signs are flipped, and a flip stays if the goal is reached sooner.

    It sees only whether the goal is reached, never a loss, and draws no random numbers. It looks for a small change: a point
    beyond the budget is asked, but never kept, and `keep="smallest"` shows what it is made for.

    Taken from the paper: the fast check at the best radius, which most flips do not pass, before a binary search for the new
    one; the hierarchical search, each stage with twice as many blocks of half the size; each ray is cut to the box coordinate
    by coordinate. As in the authors' code the first vector is all ones with its only block flipped, and the stage of single
    coordinates is repeated until the queries are spent.

    Here it is otherwise: the binary search ends at a share of the budget (there: 0.001 in Euclidean length); while no ray has
    reached the goal every flip stays, so that all ones come up too (there: never); L2 is served by the same rays, which is an
    extension: they are as long in every coordinate, so that in L2 even the best is longer than needed.

    Attributes:
        queries: The forwards of an example that is never solved, judging by the caller not included.
        tolerance: Where the binary search ends, in budgets.

    Source: Chen & Gu 2020, "RayS: a ray searching method for hard-label adversarial attack", section 3
        (https://arxiv.org/abs/2006.12792), there with 10,000 queries.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "label"
    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    queries: int = 1000
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        at_least(1, queries=self.queries)
        positive(tolerance=self.tolerance)

    def run(self, problem: Problem) -> Tensor:
        """The loops of the paper turned inside out: with each query, every example asks its own next question."""
        x, threat = problem.x, problem.threat
        widest, blocks = _widest(threat, x), _blocks(flatten_rows(x).shape[1], self.queries + 1).to(x.device)
        tolerance = self.tolerance * torch.as_tensor(threat.budget).to(widest)
        sign, best, low = torch.ones_like(x), torch.full_like(widest, torch.inf), torch.zeros_like(widest)
        tried, searching = torch.zeros_like(problem.ids), torch.zeros_like(problem.unsolved)
        ray = _flipped(sign, blocks[tried])
        for _ in problem.steps(self.queries):
            radius = torch.where(searching, (low + best) / 2, torch.minimum(best, widest))
            reached = problem.success(threat.clamp(threat.move(ray, x, x, radius)))
            nearer = reached & (radius < best)
            sign = torch.where(expand_rows(nearer | best.isinf(), x), ray, sign)
            best = torch.where(nearer, radius, best)
            low = torch.where(searching & ~reached, radius, low)
            searching = (searching | reached) & (best - low > tolerance)
            low = torch.where(searching, low, 0)
            tried += ~searching
            ray = torch.where(expand_rows(searching, x), ray, _flipped(sign, blocks[tried]))
        return threat.clamp(threat.move(sign, x, x, torch.minimum(best, widest)))


def _widest(threat: Threat, x: Tensor) -> Tensor:
    """The radius at which every ray from anywhere ends in a corner of the box, (N,); some finite one where there is no box."""
    end, zero = torch.full_like(x, torch.inf), torch.zeros_like(x)
    width = abs_max(threat.clamp(end) - threat.clamp(-end))
    step = abs_max(threat.move(zero + 1, zero, x, 1.0))
    return torch.where(width.isfinite(), width / step, _FAR * torch.as_tensor(threat.budget).to(x))


def _blocks(length: int, count: int) -> Tensor:
    """The first blocks of `length` coordinates, stage by stage: first and last coordinate, that excluded, (count, 2)."""
    found: list[tuple[int, int]] = []
    size, parts = length, 1
    while len(found) < count:
        found += [(first, min(first + size, length)) for first in range(0, length, size)]
        parts *= 2
        size = -(-length // parts)
    return torch.tensor(found[:count])


def _flipped(sign: Tensor, block: Tensor) -> Tensor:
    """`sign` (N, *S) with the signs of one block of each turned, (N, 2)."""
    at = torch.arange(flatten_rows(sign).shape[1], device=sign.device)
    inside = (at >= block[:, :1]) & (at < block[:, 1:])
    return torch.where(inside, -flatten_rows(sign), flatten_rows(sign)).reshape(sign.shape)
