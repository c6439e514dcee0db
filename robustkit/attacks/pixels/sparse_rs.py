"""Random search over a few locations and extreme colours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.noise import Noise
from robustkit._engine.tensors import nan_to_inf
from robustkit.attacks.pixels._locations import corners, painted
from robustkit.attacks.pixels._pixel_attack import PixelAttack
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["SparseRS"]

# From which of 10,000 queries on the share of replaced pixels is alpha / divisor.
_SCHEDULE = ((8000, 20), (6000, 15), (4000, 12), (2000, 10), (1000, 8), (500, 6), (200, 5), (50, 4), (0, 2))


@final
@dataclass(frozen=True)
class SparseRS(PixelAttack):
    """A set of random locations in random extreme colours; a few of them are replaced, and the change stays if it helps.

    Taken from the paper (L0 attack): the random start, one candidate a query, locations swapped against unused ones, each
    channel of a new pixel at one end of its range, unswapped pixels as they are (so a location changes its colour only by
    leaving first), the falling share of swapped pixels with its nine steps, rescaled to the number of queries, alpha = 0.3.
    As in the authors' code that share is rounded down, to at least one pixel.

    Here it is otherwise: the loss is that of the goal (there: the margin, or the cross-entropy of a wanted class); each
    image draws its own swaps (there: all of a batch the same positions of their own sets); where hardly any location is
    unused, a pixel that leaves may come back in another colour; there is one run, without restarts.

    Attributes:
        pixels: How many pixels are changed; None for as many as the threat allows. An image whose own budget is smaller keeps
            to that.
        queries: The forwards of an image that is never solved, judging by the caller not included.
        alpha: The share of the pixels that is replaced, at the beginning: alpha / 2 of them after the first query, alpha / 20
            in the end, in (0, 2].

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
            raise ArgumentError(
                f"alpha={self.alpha!r} must be at most 2: half of it is the share of the pixels that is replaced"
            )

    def swaps(self, query: int, count: int) -> int:
        """How many of `count` pixels the query of this number (from 1 on; the start is number 0) replaces, at least one."""
        at = int(query / self.queries * 10_000)
        divisor = next((divisor for begin, divisor in _SCHEDULE if at > begin), 1)
        return max(1, int(self.alpha / divisor * count))

    def search(self, problem: Problem, count: int) -> Tensor:
        """The best set of each image after all queries; the solved ones leave before."""
        x_adv, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        left = problem[rows]
        ends = corners(left.x, left.threat)
        start = left.noise("start")
        places = _order(start, left.x)[:, :count]
        colours = _coloured(start, count, ends)
        value = nan_to_inf(left.loss(painted(left.x, places, colours)))
        for query in left.steps(self.queries - 1):
            still = left.unsolved
            rows, left, places, colours, value = rows[still], left[still], places[still], colours[still], value[still]
            noise = left.noise("query", query + 1)
            new_places, new_colours = _swapped(noise, left.x, places, colours, self.swaps(query + 1, count), ends)
            loss = nan_to_inf(left.loss(painted(left.x, new_places, new_colours)))
            better = loss < value
            places = torch.where(better[:, None], new_places, places)
            colours = torch.where(better[:, None, None], new_colours, colours)
            value = torch.where(better, loss, value)
        x_adv[rows] = painted(left.x, places, colours)
        return x_adv


def _order(noise: Noise, x: Tensor) -> Tensor:
    """All locations of each image in random order, (N, H * W)."""
    return noise.at("place").uniform(x.shape[2] * x.shape[3]).argsort(dim=1, stable=True)


def _coloured(noise: Noise, count: int, ends: Tensor) -> Tensor:
    """Colours with each channel at one of the two `ends` (2, C), (N, count, C)."""
    high = (noise.at("colour").bits(count, ends.shape[1]) & 1).bool()
    return torch.where(high, ends[1], ends[0])


def _swapped(noise: Noise, x: Tensor, places: Tensor, colours: Tensor, swaps: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The sets with `swaps` of their pixels replaced: other locations, other colours."""
    count = places.shape[1]
    slots = noise.at("slot").uniform(count).argsort(dim=1, stable=True)[:, :swaps]
    # Unused locations first, then those that are just left, never those that stay.
    rank = noise.at("place").uniform(x.shape[2] * x.shape[3])
    rank = rank.scatter_add(1, places, torch.full_like(places, 2, dtype=rank.dtype).scatter(1, slots, 1.0))
    fresh = rank.argsort(dim=1, stable=True)[:, :swaps]
    new_places = places.scatter(1, slots, fresh)
    wide = slots.unsqueeze(2).expand(-1, -1, colours.shape[2])
    return new_places, colours.scatter(1, wide, _coloured(noise, swaps, ends))
