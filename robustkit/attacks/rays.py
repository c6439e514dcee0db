"""RayS: a search for the shortest ray to another decision, by decisions alone."""

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

_UNBOUNDED_RADIUS = 1000.0  # in budgets: the length of a ray where there is no box


@final
@dataclass(frozen=True)
class RayS(Attack):
    """Searches over sign vectors for the ray from x on which the goal is reached soonest, by flipping blocks of signs.

    It uses only whether the goal is reached, never a loss, and draws no random numbers. It minimises the size of the
    perturbation, so it is at its best under `keep="smallest"`: points beyond the budget are queried, but never kept.

    As in the paper: each flip is first checked at the best radius, where most fail, before a binary search for its own
    radius; the search is hierarchical, each stage with twice as many blocks of half the size; each ray is clamped to the box
    coordinate by coordinate. As in the authors' code, the first query flips the only block of a vector of ones, and the
    stage of single coordinates is repeated until the queries are used up.

    Unlike in the paper: the binary search ends at a share of the budget (there: 0.001 in Euclidean length). Until a ray
    reaches the goal, every flip is kept, so that the vector of ones is queried too (there: never). L2 is supported, with the
    same rays: they change every coordinate equally, so even the best one is longer than needed in L2.

    Attributes:
        queries: Forward passes of an example that is never solved, without the evaluation by the caller.
        tolerance: Width at which the binary search ends, in budgets.

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
        """The nested loops of the paper as one loop over queries, in which each example is at its own place."""
        x, threat = problem.x, problem.threat
        max_radius, blocks = _max_radius(threat, x), _blocks(flatten_rows(x).shape[1], self.queries + 1).to(x.device)
        tolerance = self.tolerance * torch.as_tensor(threat.budget).to(max_radius)
        signs, radius = torch.ones_like(x), torch.full_like(max_radius, torch.inf)  # of the best ray
        lower = torch.zeros_like(max_radius)  # of the binary search
        block, bisecting = torch.zeros_like(problem.ids), torch.zeros_like(problem.unsolved)
        candidate = _flip_block(signs, blocks[block])
        for _ in problem.steps(self.queries):
            tried = torch.where(bisecting, (lower + radius) / 2, torch.minimum(radius, max_radius))
            success = problem.success(threat.clamp(threat.move(candidate, x, x, tried)))
            shorter = success & (tried < radius)
            signs = torch.where(expand_rows(shorter | radius.isinf(), x), candidate, signs)
            radius = torch.where(shorter, tried, radius)
            lower = torch.where(bisecting & ~success, tried, lower)
            bisecting = (bisecting | success) & (radius - lower > tolerance)
            lower = torch.where(bisecting, lower, 0)
            block += ~bisecting
            candidate = torch.where(expand_rows(bisecting, x), candidate, _flip_block(signs, blocks[block]))
        return threat.clamp(threat.move(signs, x, x, torch.minimum(radius, max_radius)))


def _max_radius(threat: Threat, x: Tensor) -> Tensor:
    """The radius, (N,), at which every ray from any point has reached a corner of the box; finite also without a box."""
    infinite, zero = torch.full_like(x, torch.inf), torch.zeros_like(x)
    width = abs_max(threat.clamp(infinite) - threat.clamp(-infinite))
    unit = abs_max(threat.move(zero + 1, zero, x, 1.0))
    return torch.where(width.isfinite(), width / unit, _UNBOUNDED_RADIUS * torch.as_tensor(threat.budget).to(x))


def _blocks(size: int, count: int) -> Tensor:
    """The first `count` blocks of `size` coordinates, stage by stage: (count, 2), first coordinate and one past the last."""
    blocks: list[tuple[int, int]] = []
    length, parts = size, 1
    while len(blocks) < count:
        blocks += [(first, min(first + length, size)) for first in range(0, size, length)]
        parts *= 2
        length = -(-size // parts)
    return torch.tensor(blocks[:count])


def _flip_block(signs: Tensor, block: Tensor) -> Tensor:
    """`signs` (N, *S) with the signs of one block per example, (N, 2), flipped."""
    index = torch.arange(flatten_rows(signs).shape[1], device=signs.device)
    inside = (index >= block[:, :1]) & (index < block[:, 1:])
    return torch.where(inside, -flatten_rows(signs), flatten_rows(signs)).reshape(signs.shape)
