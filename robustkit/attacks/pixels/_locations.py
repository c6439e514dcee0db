"""What searches over the locations of images share: extreme colours, painting, asking, and a map of what a pixel does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from robustkit._engine.tensors import nan_to_inf
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["EffectMap", "answers", "corners", "extremes", "painted"]

_GRID = 8  # so many locations along the longer side are asked first
_REACH = 1.0  # what a location tells of another falls by a factor e over so many locations, in steps of the first grid / 4
_DOUBT = 0.25  # so many answers about full changes weigh as much as the expectation that a pixel does nothing
_CURIOSITY = 0.5  # how many typical effects a location without answers may be better than expected
_LEAST = 0.02  # smallest change of colour that counts as one


def corners(x: Tensor, threat: Threat) -> Tensor:
    """The lowest and the highest colour, (2, C): written, not computed, so the ends of the range bit for bit."""
    low, high = threat.bounds or (0.0, 1.0)
    return torch.tensor([low, high], dtype=x.dtype, device=x.device).unsqueeze(1).expand(2, x.shape[1])


def extremes(x: Tensor, threat: Threat) -> Tensor:
    """Colours at the ends of the range, (M, C): black, white, then each channel alone white, each channel alone black.

    With one channel two, with three all eight; with more the 2 C + 2 of these kinds, not all 2^C.
    """
    low, high = corners(x, threat)
    one = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    kinds = [torch.zeros_like(one[:1]), torch.ones_like(one[:1])]
    if x.shape[1] > 1:
        kinds += [one] if x.shape[1] == 2 else [one, ~one]
    return torch.where(torch.cat(kinds), high, low)


def painted(x: Tensor, places: Tensor, colours: Tensor) -> Tensor:
    """`x` (R, C, H, W) with the locations `places` (R, K), each named once, in the colours (R, K, C)."""
    where = places.unsqueeze(1).expand(-1, x.shape[1], -1)
    return x.flatten(2).scatter(2, where, colours.transpose(1, 2)).reshape(x.shape)


def answers(problem: Problem, count: int, points: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """The losses of `count` points of each example in float64, (N, count); infinite where an example left before.

    Args:
        problem: The examples, at most `problem.most`.
        count: How many points there are of each.
        points: Given examples (R,) and a slice of the points, those points one example after the other, (R * M, *S).
    """
    out = torch.full((len(problem), count), torch.inf, dtype=torch.float64, device=problem.x.device)
    done = 0
    while done < count:
        rows = problem.unsolved.nonzero().squeeze(1)
        if not len(rows):
            break
        ahead = slice(done, min(count, done + max(1, problem.batch_size // len(rows))))
        many = ahead.stop - done
        loss = problem[rows.repeat_interleave(many)].loss(points(rows, ahead))
        out[rows, ahead] = nan_to_inf(loss).reshape(len(rows), many)
        done = ahead.stop
    return out


@final
class EffectMap:
    """What black and white pixels were seen to do to the loss of each image, and what they are expected to do elsewhere.

    A pixel counts by its effect: how much it lowers the loss. The effect is taken as proportional to the change of colour,
    with a factor that is similar at nearby locations: the expectation is a weighted regression on the answers nearby,
    drawn to zero where there are few. Candidates are numbered colour by colour: black at each of the H * W locations, then
    white. All is computed one row at a time and in float64, so that no image depends on its batch.

    Attributes:
        contrast: How far each candidate's colour is from the image's, mean over the channels, in widths of the range,
            (N, 2 * H * W).
        seen: The largest effect that was seen of each candidate, (N, 2 * H * W); minus infinity before any.
    """

    def __init__(self, x: Tensor, threat: Threat) -> None:
        self._height, self._width = x.shape[2:]
        colours, width = extremes(x, threat)[:2].double(), float(torch.as_tensor(threat.budget))
        change = [(x.double() - colour[:, None, None]).abs().sum(1).flatten(1) / x.shape[1] / width for colour in colours]
        self.contrast = torch.cat(change, 1).clamp(min=_LEAST)
        self.seen = torch.full_like(self.contrast, -torch.inf)
        self._pull, self._weight = torch.zeros_like(self.contrast), torch.zeros_like(self.contrast)
        self._square, self._count = torch.zeros_like(self.contrast[:, 0]), 0

    def narrow(self, rows: Tensor) -> None:
        """Forget all but some of the images."""
        self.contrast, self.seen, self._square = self.contrast[rows], self.seen[rows], self._square[rows]
        self._pull, self._weight = self._pull[rows], self._weight[rows]

    def grid(self, both: bool) -> Tensor:
        """Candidates spread over the images, the largest changes of colour first, (N, M).

        Args:
            both: Black and white at each location, instead of the one that is further from its colour.
        """
        step = -(-max(self._height, self._width) // _GRID)
        down, across = (torch.arange(min(step // 2, size - 1), size, step) for size in (self._height, self._width))
        places = (down[:, None] * self._width + across).flatten().to(self.contrast.device)
        every = torch.cat([places, places + self._height * self._width]).expand(len(self.contrast), -1)
        if not both:
            black, white = every[:, : len(places)], every[:, len(places) :]
            every = torch.where(self.contrast.gather(1, black) >= self.contrast.gather(1, white), black, white)
        return every.gather(1, self.contrast.gather(1, every).argsort(dim=1, descending=True, stable=True))

    def learn(self, candidates: Tensor, effects: Tensor) -> None:
        """Take note of the effects of some candidates of each image, (N, M) and (N, M)."""
        contrast = self.contrast.gather(1, candidates)
        self._pull.scatter_add_(1, candidates, effects * contrast)
        self._weight.scatter_add_(1, candidates, contrast.square())
        self.seen.scatter_reduce_(1, candidates, effects, "amax")
        for column in effects.unbind(1):  # in this order for any number of rows
            self._square += column.square()
        self._count += effects.shape[1]

    def acquisition(self) -> Tensor:
        """How good each candidate may be: the expected effect, and more where little is known, (N, 2 * H * W)."""
        weight = self._spread(self._weight) + _DOUBT
        typical = (self._square / max(1, self._count)).sqrt().clamp(min=1e-300).unsqueeze(1)
        return self.contrast * (self._spread(self._pull) / weight + _CURIOSITY * typical / weight.sqrt())

    def _spread(self, value: Tensor) -> Tensor:
        """Each number shared with the locations around, less and less; sums in a fixed order."""
        grid = value.reshape(len(value), 2, self._height, self._width)
        reach = _REACH * max(1.0, max(self._height, self._width) / _GRID / 4)
        for dim in (2, 3):
            total, size = grid.clone(), grid.shape[dim]
            for far in range(1, min(round(4 * reach), size - 1) + 1):
                share = math.exp(-far / reach)
                total.narrow(dim, far, size - far).add_(grid.narrow(dim, 0, size - far), alpha=share)
                total.narrow(dim, 0, size - far).add_(grid.narrow(dim, far, size - far), alpha=share)
            grid = total
        return grid.flatten(1)
