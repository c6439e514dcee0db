"""Random search over small windows, as Square does it, but from points that are near the goal, and for as long as it gains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkit._engine.tensors import expand_rows, nan_to_inf
from robustkit.attacks._square_patches import numbers, propose
from robustkit.problem import Problem

__all__ = ["search"]

_AT_ONCE = 25  # windows are asked of each example where that many may be: with few examples left, a step costs its overhead


def search(
    problem: Problem,
    rows: Tensor,
    near: tuple[Tensor, Tensor],
    queries: int,
    share: float,
    *path: str | int,
    patience: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Of several windows changed at random the best is taken, if it helps; again and again, until the example is solved.

    Args:
        problem: What is asked.
        rows: Of which examples, (M,) indices, none of them twice.
        near: Where to begin, (M, *S), and the edge of the goal there, (M,).
        queries: How many windows are asked of each, 25 at once, or as many as may go through the model.
        share: Of an image is what a window covers.
        path: What the random numbers are for.
        patience: The share of the queries after which an example that has gained nothing in them is let go.

    Returns:
        The nearest points, (M, *S), and the edges there, (M,).
    """
    at_once = min(_AT_ONCE, problem.batch_size)
    (at, edge), times = near, queries // at_once
    if not (times and len(rows)):
        return near
    # All numbers at once: those of one query after another would cost more than what is done with them.
    drawn = problem[rows].noise(*path).uniform(times, at_once, numbers(problem.threat, problem.x))
    idle, limit = torch.zeros_like(rows), math.ceil(patience * times)
    for query in range(times):
        before = edge
        left = (problem.unsolved[rows] & (idle < limit)).nonzero().squeeze(1)
        for some in torch.split(left, problem.batch_size // at_once) if len(left) else ():
            found, points = _best(problem[rows[some].repeat_interleave(at_once)], at[some], drawn[some, query], share)
            better = found < edge[some]
            at = at.index_copy(0, some, torch.where(expand_rows(better, points), points, at[some]))
            edge = edge.index_copy(0, some, torch.where(better, found.to(edge), edge[some]))
        idle = torch.where(edge < before, 0, idle + 1)
    return at, edge


def _best(problem: Problem, at: Tensor, drawn: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The smallest edge of several windows each, (M,), and the point that has it, (M, *S); `drawn` (M, windows, numbers)."""
    count = drawn.shape[1]
    candidate = propose(problem.threat, at.repeat_interleave(count, 0), problem.x, share, drawn.flatten(0, 1))
    edge, which = nan_to_inf(problem.goal.boundary_margin(problem.predict(candidate), problem.ref)).reshape(-1, count).min(1)
    return edge, candidate[which + torch.arange(len(at), device=at.device) * count]
