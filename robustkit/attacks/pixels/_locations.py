"""What searches over pixel locations share: extreme colours, painting, batched queries and a map of the effects of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from robustkit._engine.tensors import nan_to_inf
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["EffectMap", "channel_bounds", "extreme_colours", "paint", "query_losses"]

_GRID = 8  # locations of the first grid along the longer side
_DECAY_LENGTH = 1.0  # distance at which the weight of an observation falls by a factor e, in steps of the first grid / 4
_PRIOR_WEIGHT = 0.25  # weight of the prior mean zero, in observations at full contrast
_EXPLORATION = 0.5  # bonus of a location without observations, in typical effects
_MIN_CONTRAST = 0.02


def channel_bounds(x: Tensor, threat: Threat) -> Tensor:
    """The lowest and the highest value of each channel, (2, C): copied, not computed, so bit for bit the bounds."""
    low, high = threat.bounds or (0.0, 1.0)
    return torch.tensor([low, high], dtype=x.dtype, device=x.device).unsqueeze(1).expand(2, x.shape[1])


def extreme_colours(x: Tensor, threat: Threat) -> Tensor:
    """Colours with every channel at a bound, (M, C): black, white, each channel alone white, then each alone black.

    With one channel these are two, with three all eight; with more only these 2 C + 2, not all 2^C.
    """
    low, high = channel_bounds(x, threat)
    one = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    is_high = [torch.zeros_like(one[:1]), torch.ones_like(one[:1])]
    if x.shape[1] > 1:
        is_high += [one] if x.shape[1] == 2 else [one, ~one]
    return torch.where(torch.cat(is_high), high, low)


def paint(x: Tensor, locations: Tensor, colours: Tensor) -> Tensor:
    """`x` (R, C, H, W) with the pixels at `locations` (R, K), no two equal in a row, replaced by `colours` (R, K, C)."""
    index = locations.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).scatter(2, index, colours.transpose(1, 2)).reshape(x.shape)


def query_losses(problem: Problem, count: int, points: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The losses of `count` points per example, (N, count) float64; infinite for points after a success.

    The first points of all examples are queried, then the next ones, in full batches: an example that is solved early costs
    few queries.

    Args:
        problem: At most `problem.batch_size` examples.
        count: The number of points per example.
        points: Maps examples (R,) and a slice of M points to these points, one example after the other, (R * M, *S).
    """
    losses = torch.full((len(problem), count), torch.inf, dtype=torch.float64, device=problem.x.device)
    repeated, shape, done = problem, (0, 0), 0
    while done < count:
        rows = problem.unsolved.nonzero().squeeze(1)
        if not len(rows):
            break
        chunk = slice(done, min(count, done + max(1, problem.batch_size // len(rows))))
        size = chunk.stop - done
        if shape != (len(rows), size):  # unsolved examples only become fewer: an equal number means the same ones
            repeated, shape = problem[rows.repeat_interleave(size)], (len(rows), size)
        losses[rows, chunk] = nan_to_inf(repeated.loss(points(rows, chunk))).reshape(shape)
        done = chunk.stop
    return losses


@final
class EffectMap:
    """The observed effects of black and white pixels on the loss of each image, and the effects expected elsewhere.

    The effect of a pixel is the decrease of the loss. It is modelled as proportional to the contrast, with a factor that is
    similar at nearby locations: a weighted regression on nearby observations, shrunk to zero where there are few. Candidates
    are numbered colour by colour: black at each of the H * W locations, then white. All sums are row by row and in float64,
    so that no image depends on its batch.

    Attributes:
        contrast: The distance of each candidate's colour from the pixel in the image: mean over the channels, in units of
            the value range, (N, 2 * H * W).
        observed: The largest observed effect of each candidate, (N, 2 * H * W); minus infinity before any.
    """

    def __init__(self, x: Tensor, threat: Threat) -> None:
        self._height, self._width = x.shape[2:]
        colours, value_range = extreme_colours(x, threat)[:2].double(), float(torch.as_tensor(threat.budget))
        contrasts = [
            (x.double() - colour[:, None, None]).abs().sum(1).flatten(1) / x.shape[1] / value_range for colour in colours
        ]
        self.contrast = torch.cat(contrasts, 1).clamp(min=_MIN_CONTRAST)
        self.observed = torch.full_like(self.contrast, -torch.inf)
        # Sums of effect * contrast and of contrast^2: the regression through the origin is their quotient.
        self._product, self._weight = torch.zeros_like(self.contrast), torch.zeros_like(self.contrast)
        self._square_sum, self._count = torch.zeros_like(self.contrast[:, 0]), 0

    def keep(self, mask: Tensor) -> None:
        """Drop all images but those of `mask`, (N,) bool."""
        self.contrast, self.observed, self._square_sum = self.contrast[mask], self.observed[mask], self._square_sum[mask]
        self._product, self._weight = self._product[mask], self._weight[mask]

    def grid(self, both_colours: bool) -> Tensor:
        """Candidates on a coarse grid, highest contrast first, (N, M).

        Args:
            both_colours: Black and white at each location, instead of the one of higher contrast.
        """
        step = -(-max(self._height, self._width) // _GRID)
        row, column = (torch.arange(min(step // 2, size - 1), size, step) for size in (self._height, self._width))
        locations = (row[:, None] * self._width + column).flatten().to(self.contrast.device)
        candidates = torch.cat([locations, locations + self._height * self._width]).expand(len(self.contrast), -1)
        if not both_colours:
            black, white = candidates[:, : len(locations)], candidates[:, len(locations) :]
            black_is_further = self.contrast.gather(1, black) >= self.contrast.gather(1, white)
            candidates = torch.where(black_is_further, black, white)
        return candidates.gather(1, self.contrast.gather(1, candidates).argsort(dim=1, descending=True, stable=True))

    def update(self, candidates: Tensor, effects: Tensor) -> None:
        """Add the observed effects, (N, M), of the candidates, (N, M), of each image."""
        contrast = self.contrast.gather(1, candidates)
        self._product.scatter_add_(1, candidates, effects * contrast)
        self._weight.scatter_add_(1, candidates, contrast.square())
        self.observed.scatter_reduce_(1, candidates, effects, "amax")
        for column in effects.unbind(1):  # a fixed order of summation, whatever the number of rows
            self._square_sum += column.square()
        self._count += effects.shape[1]

    def acquisition(self) -> Tensor:
        """The acquisition function: the expected effect plus a bonus for few observations nearby, (N, 2 * H * W)."""
        weight = self._smooth(self._weight) + _PRIOR_WEIGHT
        typical = (self._square_sum / max(1, self._count)).sqrt().clamp(min=1e-300).unsqueeze(1)
        return self.contrast * (self._smooth(self._product) / weight + _EXPLORATION * typical / weight.sqrt())

    def _smooth(self, values: Tensor) -> Tensor:
        """The values convolved with an exponentially decaying kernel over the locations; sums in a fixed order."""
        grid = values.reshape(len(values), 2, self._height, self._width)
        decay_length = _DECAY_LENGTH * max(1.0, max(self._height, self._width) / _GRID / 4)
        for dim in (2, 3):
            total, size = grid.clone(), grid.shape[dim]
            for distance in range(1, min(round(4 * decay_length), size - 1) + 1):
                weight = math.exp(-distance / decay_length)
                total.narrow(dim, distance, size - distance).add_(grid.narrow(dim, 0, size - distance), alpha=weight)
                total.narrow(dim, 0, size - distance).add_(grid.narrow(dim, distance, size - distance), alpha=weight)
            grid = total
        return grid.flatten(1)
