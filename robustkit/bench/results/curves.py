"""Whole curves from one run: what stays right after so much cost, and under so much change."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustkit.result import Result

__all__ = ["GRID", "Curve", "against_cost", "against_eps", "costs"]

GRID: Final = 50  # places of a curve at most, besides its begin

Curve = list[list[float]]  # of [place, share that is still right there], by increasing place


def costs(result: Result) -> Tensor:
    """What each example cost in forwards, a gradient counted as two, (N,) int64."""
    return result.forwards + 2 * result.backwards


def against_cost(result: Result, clean: NDArray[np.bool_], robust: NDArray[np.bool_]) -> Curve:
    """The share of all images that would still be right had the attack been stopped after a cost for each image.

    A solved example leaves, so its cost is that of its solution: what is right after B is what was right before and is
    unsolved or cost more than B. Of more than `GRID` steps down some are left out, evenly; at those that are told the share
    is exact, and between them it is at most that of the one before.

    Returns:
        [cost, share] at 0, at steps, and at the largest cost of all.
    """
    spent = costs(result).cpu().numpy()
    fell = spent[clean & ~robust]
    steps = np.unique(fell)
    at = sorted({0, *steps[_spread(len(steps))].tolist(), int(spent.max(initial=0))})
    return [[float(cost), float(clean.sum() - (fell <= cost).sum()) / len(clean)] for cost in at]


def against_eps(
    result: Result, clean: NDArray[np.bool_], robust: NDArray[np.bool_], eps: float, *, whole: bool = False
) -> Curve:
    """The share of all images that stay right under every eps up to that of the run, by the smallest change of each.

    Args:
        result: Of a minimum-norm attack run with keep="smallest".
        clean: Which images are right without an attack, (N,).
        robust: Which are right before and after, (N,).
        eps: Of the run.
        whole: Whether eps counts something, and only whole numbers mean anything.

    Returns:
        [eps, share] at 0 and at `GRID` even places, or at the whole numbers.
    """
    # What rounding has put beyond the budget by a hair was judged to be inside.
    sizes = result.size.cpu().clamp(max=eps).numpy()[clean & ~robust]
    places = torch.linspace(0, eps, GRID + 1, dtype=torch.float64).tolist()[1:]
    at = sorted({float(round(place)) for place in places} - {0.0}) if whole else [*places[:-1], eps]
    # At 0 it is the clean accuracy, though a change of size 0 may do where a model is not the same twice.
    right = [float(clean.sum()), *(float(clean.sum() - (sizes <= place).sum()) for place in at)]
    return [[place, count / len(clean)] for place, count in zip([0.0, *at], right, strict=True)]


def _spread(count: int) -> NDArray[np.int64]:
    """All of so many indices, or `GRID` of them at even distances, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, GRID)).round().astype(np.int64))
