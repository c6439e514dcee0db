"""Random search over small square patches, as in the Square attack, but from given points and with early stopping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkit._engine.tensors import nan_to_inf
from robustkit.attacks._descent import BestPoint
from robustkit.attacks._square_patches import propose, uniforms_per_example
from robustkit.problem import Problem

__all__ = ["search_patches"]

_CANDIDATES = 25  # per example and batch: with few unsolved examples the cost of a batch is mostly overhead


def search_patches(
    problem: Problem,
    rows: Tensor,
    best: BestPoint,
    queries: int,
    patch_share: float,
    *path: str | int,
    patience: float = 1.0,
) -> None:
    """Perturb patches at random; replace the best point by the best of several candidates if it has a smaller margin.

    Args:
        problem: The examples.
        rows: Indices of the examples to search, (M,), each once.
        best: The points to start from, (M, *S), and their boundary margins as losses, (M,); updated in place.
        queries: Queries per example, 25 in a batch, or as many as the model takes.
        patch_share: The share of the image that a patch covers.
        path: Purpose and draw of the random numbers.
        patience: The share of the queries without improvement after which an example is given up.
    """
    candidates = min(_CANDIDATES, problem.batch_size)
    rounds = queries // candidates
    if not (rounds and len(rows)):
        return
    # All random numbers are drawn at once: drawn for each round, they would cost more than the rest of the search.
    uniforms = problem[rows].noise(*path).uniform(rounds, candidates, uniforms_per_example(problem.threat, problem.x))
    idle, limit = torch.zeros_like(rows), math.ceil(patience * rounds)
    for number in range(rounds):
        before = best.loss
        active = (problem.unsolved[rows] & (idle < limit)).nonzero().squeeze(1)
        for chunk in torch.split(active, problem.batch_size // candidates) if len(active) else ():
            examples = problem[rows[chunk].repeat_interleave(candidates)]
            best.update(*_best_candidate(examples, best.x_adv[chunk], uniforms[chunk, number], patch_share), chunk)
        idle = torch.where(best.loss < before, 0, idle + 1)


def _best_candidate(problem: Problem, x_adv: Tensor, uniforms: Tensor, patch_share: float) -> tuple[Tensor, Tensor]:
    """The candidate of smallest boundary margin for each example, (M, *S), and its margin, (M,).

    Args:
        problem: Each example once per candidate.
        x_adv: The points to perturb, (M, *S).
        uniforms: Random numbers in [0, 1), (M, candidates, numbers).
        patch_share: The share of the image that a patch covers.
    """
    count = uniforms.shape[1]
    points = propose(problem.threat, x_adv.repeat_interleave(count, 0), problem.x, patch_share, uniforms.flatten(0, 1))
    margins = nan_to_inf(problem.goal.boundary_margin(problem.predict(points), problem.ref)).reshape(-1, count)
    smallest, index = margins.min(1)
    return points[index + torch.arange(len(x_adv), device=x_adv.device) * count], smallest
