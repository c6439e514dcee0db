"""Curves of robust accuracy from a single run: against the cost of the attack, and against eps."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.result import Result

__all__ = ["GRID", "Curve", "against_cost", "against_eps", "costs"]

GRID: Final = 50  # the largest number of points of a curve, not counting the one at 0

Curve = list[list[float]]  # points [cost or eps, robust accuracy], the first coordinate increasing


def costs(result: Result) -> Tensor:
    """The cost of each example in forward passes, a backward pass counted as two, (N,) int64."""
    return result.forwards + 2 * result.backwards


def against_cost(result: Result, correct: NDArray[np.bool_], robust: NDArray[np.bool_]) -> Curve:
    """Robust accuracy against cost: as if the attack had been stopped after a number of forward passes per image.

    Solved examples are skipped, so the cost of an example is the cost of solving it. An image counts as robust after cost B if
    it is correctly classified without an attack, and if it is unsolved or cost more than B. A curve with more than `GRID`
    steps is thinned out evenly. It is exact at its points; between two points the exact value is at most that of the left one.

    Args:
        result: The result of the attack.
        correct: Which images are classified correctly without an attack, (N,).
        robust: Which images are classified correctly before and after the attack, (N,).

    Returns:
        Points [cost, robust accuracy] at 0, at steps of the curve, and at the largest cost.
    """
    all_costs = costs(result).cpu().numpy()
    costs_of_broken = all_costs[correct & ~robust]
    steps = np.unique(costs_of_broken)
    points = sorted({0, *steps[_evenly_spaced(len(steps))].tolist(), int(all_costs.max(initial=0))})
    return [[float(cost), float(correct.sum() - (costs_of_broken <= cost).sum()) / len(correct)] for cost in points]


def against_eps(
    result: Result, correct: NDArray[np.bool_], robust: NDArray[np.bool_], eps: float, *, integers: bool = False
) -> Curve:
    """Robust accuracy at every eps up to that of the run, from the smallest adversarial perturbation of each image.

    Args:
        result: The result of a minimum-norm attack with keep="smallest".
        correct: Which images are classified correctly without an attack, (N,).
        robust: Which images are classified correctly before and after the attack, (N,).
        eps: The eps of the run.
        integers: Whether only integers are possible, as for a number of pixels.

    Returns:
        Points [eps, robust accuracy] at 0 and at `GRID` evenly spaced values, or at integers.
    """
    # Rounding may have put a size slightly above eps; such points were accepted as inside the ball.
    sizes = result.size.cpu().clamp(max=eps).numpy()[correct & ~robust]
    grid = torch.linspace(0, eps, GRID + 1, dtype=torch.float64).tolist()[1:]
    values = sorted({float(round(value)) for value in grid} - {0.0}) if integers else [*grid[:-1], eps]
    # The clean accuracy at 0: a stochastic model may have been fooled with a perturbation of size 0.
    counts = [float(correct.sum()), *(float(correct.sum() - (sizes <= value).sum()) for value in values)]
    return [[value, count / len(correct)] for value, count in zip([0.0, *values], counts, strict=True)]


def _evenly_spaced(count: int) -> NDArray[np.int64]:
    """All indices below `count`, or `GRID` of them evenly spaced, including the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, GRID)).round().astype(np.int64))
