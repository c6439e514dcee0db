"""Sparse-RS: random search over sets of pixels in extreme colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.noise import Noise
from robustkit._engine.tensors import nan_to_inf
from robustkit.attacks.pixels._locations import channel_bounds, paint
from robustkit.attacks.pixels._pixel_attack import PixelAttack
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["SparseRS"]

# (query, divisor): after that query of 10,000, the share of replaced pixels is alpha / divisor.
_SCHEDULE = ((8000, 20), (6000, 15), (4000, 12), (2000, 10), (1000, 8), (500, 6), (200, 5), (50, 4), (0, 2))


@final
@dataclass(frozen=True)
class SparseRS(PixelAttack):
    """A set of random pixels in random extreme colours; a few are replaced at a time, which is kept if the loss falls.

    As in the paper (L0 attack): the random start, one candidate per query, replaced locations swapped with unused ones, each
    channel of a new pixel at one of its bounds, other pixels unchanged (so a location changes its colour only after leaving
    the set), the decreasing share of replaced pixels in nine stages, rescaled to the number of queries, alpha = 0.3. As in
    the authors' code that share is rounded down, to at least one pixel.

    Unlike in the paper: the loss is that of the goal (there: the margin, or the cross-entropy of a target class); each image
    draws its own swaps (there: one draw of positions in the set for the whole batch); where too few locations are unused, a
    replaced pixel may return in another colour; there is one run, without restarts.

    Attributes:
        pixels: Number of pixels to change; None for as many as the threat allows. An image with a smaller budget of its own
            keeps to that.
        queries: Forward passes of an image that is never solved, without the evaluation by the caller.
        alpha: Controls the share of replaced pixels, in (0, 2]: alpha / 2 after the first query, alpha / 20 in the end.

    Source: Croce, Andriushchenko, Singh, Flammarion & Hein 2022, "Sparse-RS: a versatile framework for query-efficient
        sparse black-box adversarial attacks", algorithms 1 and 2 (https://arxiv.org/abs/2006.12834), there with up to
        10,000 queries.
    """

    queries: int = 1000
    alpha: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, queries=self.queries)
        positive(alpha=self.alpha)
        if self.alpha > 2:
            raise ArgumentError(f"alpha={self.alpha!r} must be at most 2: half of it is the share of replaced pixels")

    def swaps(self, query: int, count: int) -> int:
        """How many of `count` pixels a query replaces, at least one; queries count from 1, the start is query 0."""
        rescaled = int(query / self.queries * 10_000)
        divisor = next((divisor for begin, divisor in _SCHEDULE if rescaled > begin), 1)
        return max(1, int(self.alpha / divisor * count))

    def search(self, problem: Problem, count: int) -> Tensor:
        """Algorithm 1; solved images leave the batch."""
        x_adv, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        problem = problem[rows]
        bounds = channel_bounds(problem.x, problem.threat)
        start = problem.noise("start")
        locations = _shuffled_locations(start, problem.x)[:, :count]
        colours = _random_extreme_colours(start, count, bounds)
        lowest = nan_to_inf(problem.loss(paint(problem.x, locations, colours)))
        for query in problem.steps(self.queries - 1):
            unsolved = problem.unsolved
            rows, problem, lowest = rows[unsolved], problem[unsolved], lowest[unsolved]
            locations, colours = locations[unsolved], colours[unsolved]
            noise = problem.noise("query", query + 1)
            swaps = self.swaps(query + 1, count)
            new_locations, new_colours = _replace_pixels(noise, problem.x, locations, colours, swaps, bounds)
            loss = nan_to_inf(problem.loss(paint(problem.x, new_locations, new_colours)))
            lower = loss < lowest
            locations = torch.where(lower[:, None], new_locations, locations)
            colours = torch.where(lower[:, None, None], new_colours, colours)
            lowest = torch.where(lower, loss, lowest)
        x_adv[rows] = paint(problem.x, locations, colours)
        return x_adv


def _shuffled_locations(noise: Noise, x: Tensor) -> Tensor:
    """All locations of each image in random order, (N, H * W)."""
    return noise.at("place").uniform(x.shape[2] * x.shape[3]).argsort(dim=1, stable=True)


def _random_extreme_colours(noise: Noise, count: int, bounds: Tensor) -> Tensor:
    """Colours with each channel at one of its two `bounds` (2, C), (N, count, C)."""
    is_high = (noise.at("colour").bits(count, bounds.shape[1]) & 1).bool()
    return torch.where(is_high, bounds[1], bounds[0])


def _replace_pixels(
    noise: Noise, x: Tensor, locations: Tensor, colours: Tensor, swaps: int, bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """The sets with `swaps` of their pixels at other locations in random colours (algorithm 2)."""
    count = locations.shape[1]
    slots = noise.at("slot").uniform(count).argsort(dim=1, stable=True)[:, :swaps]
    # Ranks put unused locations first, then those that are replaced, then those that stay.
    rank = noise.at("place").uniform(x.shape[2] * x.shape[3])
    rank = rank.scatter_add(1, locations, torch.full_like(locations, 2, dtype=rank.dtype).scatter(1, slots, 1.0))
    unused = rank.argsort(dim=1, stable=True)[:, :swaps]
    slots_per_channel = slots.unsqueeze(2).expand(-1, -1, colours.shape[2])
    return locations.scatter(1, slots, unused), colours.scatter(
        1, slots_per_channel, _random_extreme_colours(noise, swaps, bounds)
    )
