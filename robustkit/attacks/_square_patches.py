"""How Square changes an image: a window of it in each norm, for all images of a batch at once, each with its own place.

The last two axes of any data are height and width, all axes before them are channels, missing ones are of size one: a row of
a table is an image of height one.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import expand_rows
from robustkit.threats import L2, Linf, Threat

__all__ = ["numbers", "propose", "sides", "start"]

_TILES = 5  # of the L2 start, along the shorter side
_CANCELLED = 1e-6  # so short a sum of two unit vectors is rounding


def start(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """A first point for each of `x` (N, *S) that spends the whole budget, box aside."""
    return _WAYS[type(threat)][0](threat, _images(x), noise).reshape(x.shape)


def numbers(threat: Threat, x: Tensor) -> int:
    """How many random numbers `moved` needs for each example."""
    return (5 if type(threat) is L2 else 2) + _images(x[:1]).shape[1]


def propose(threat: Threat, x_adv: Tensor, x: Tensor, share: float, drawn: Tensor) -> Tensor:
    """`x_adv` (N, *S) with a random window of each changed, so that the whole budget is spent, box aside.

    Args:
        threat: Linf or L2.
        x_adv: Where the search stands.
        x: The unchanged inputs.
        share: Which share of the image the window covers, in (0, 1].
        drawn: Uniform numbers in [0, 1), (N, `numbers`): where, and in which colours.
    """
    return _WAYS[type(threat)][1](threat, _images(x_adv), _images(x), share, drawn).reshape(x.shape)


def sides(share: float, height: int, width: int, least: int = 1) -> tuple[int, int]:
    """Height and width of a window that covers a share of an image: a square, of an odd side where it must be 3 or more.

    A square that is larger than the shorter side of the image becomes a rectangle of the same area.
    """
    area = share * height * width
    side = max(least, round(math.sqrt(area)))
    side += least > 1 and side % 2 == 0
    short, long = sorted((height, width))
    if side <= short:
        return side, side
    longer = min(long, max(side, round(area / short)))
    return (short, longer) if height <= width else (longer, short)


def _images(x: Tensor) -> Tensor:
    """(N, *S) -> (N, C, H, W)."""
    height, width = (1, *x.shape[1:])[-2:]
    return x.reshape(len(x), -1, height, width)


def _signs(uniform: Tensor, x: Tensor) -> Tensor:
    """Plus and minus one in the type of `x`, from uniform numbers in [0, 1)."""
    return 1 - 2 * (uniform < 0.5).to(x)


def _stripes(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """Vertical stripes one pixel wide, each channel of each at one end of the ball."""
    channels, _, width = x.shape[1:]
    return threat.steepest(_signs(noise.uniform(channels, 1, width), x).expand_as(x), x)


def _coloured(threat: Threat, x_adv: Tensor, x: Tensor, share: float, drawn: Tensor) -> Tensor:
    """A window in one colour, each channel at one end of the ball (algorithm 2); never the image that was there."""
    window = _Window(drawn[:, :2], sides(share, x.shape[2], x.shape[3]), x)
    had, unchanged = window.read(x_adv), window.read(x)
    colour = _signs(drawn[:, 2:], x)[:, :, None].expand_as(had)
    ends, opposite = threat.steepest(colour, unchanged), threat.steepest(-colour, unchanged)
    same = ~(ends != had).flatten(1).any(1)
    return window.write(x_adv, torch.where(expand_rows(same, had), opposite, ends))


def _tiles(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """Square tiles side by side, each a bump of random sign in each channel."""
    side = max(1, min(x.shape[2:]) // _TILES)
    count = [size // side for size in x.shape[2:]]
    at = [torch.arange(size, device=x.device) - size % side // 2 for size in x.shape[2:]]
    row, column = (position // side for position in at)
    inside = _within(row, count[0])[:, None] & _within(column, count[1])
    tile = row.clamp(0, count[0] - 1)[:, None] * count[1] + column.clamp(0, count[1] - 1)  # (H, W)
    sign = _signs(noise.at("sign").uniform(x.shape[1], math.prod(count)), x)[:, :, tile]
    turned = _turned(noise.at("turn").uniform(math.prod(count)))[:, tile]
    bump = _bumps(side, side, x)[turned, (at[0] % side)[:, None], at[1] % side]
    change = sign * (bump * inside).unsqueeze(1)
    return threat.project(threat.step(change.to(x), x, x, 1.0), x)


def _shifted(threat: Threat, x_adv: Tensor, x: Tensor, share: float, drawn: Tensor) -> Tensor:
    """What a second window had, and what the budget has left, goes to a bump on top of a first one (algorithm 3)."""
    size = sides(share, x.shape[2], x.shape[3], least=3)
    here, there = _Window(drawn[:, :2], size, x), _Window(drawn[:, 2:4], size, x)
    change = x_adv - x
    # What is in a window is reckoned in float64, which costs nothing there.
    first, second = here.read(change).double(), there.read(change).double() * ~here.covers(there)
    budget = torch.as_tensor(threat.budget, dtype=torch.float64, device=x.device).reshape(-1, 1, 1)
    spent = change.flatten(1).square().sum(1, dtype=torch.float64)[:, None, None]
    unused = (budget.square() - spent).clamp(min=0) / x.shape[1]
    available = (_length(first).square() + _length(second).square() + unused).sqrt()
    bump = _signs(drawn[:, 5:], first)[:, :, None] * _bumps(*size, x).flatten(1)[_turned(drawn[:, 4])][:, None]
    fresh = bump + _unit(first)
    fresh = torch.where(_length(fresh) < _CANCELLED, bump, fresh)
    emptied = there.write(change, torch.zeros_like(second).to(x))
    return threat.project(x + here.write(emptied, (_unit(fresh) * available).to(x)), x)


@final
class _Window:
    """A window of each image, of one size, each at its own place: few pixels, so they are taken out and put back.

    Args:
        drawn: Uniform numbers in [0, 1), (N, 2): where.
        size: Height and width of the windows.
        x: The images, (N, C, H, W).
    """

    def __init__(self, drawn: Tensor, size: tuple[int, int], x: Tensor) -> None:
        # In double, since a product in float32 may be rounded up to the first place outside.
        first = [
            (at * (whole - length + 1)).long()
            for at, length, whole in zip(drawn.double().unbind(1), size, x.shape[2:], strict=True)
        ]
        self._rows, self._columns = (
            at[:, None] + torch.arange(length, device=x.device) for at, length in zip(first, size, strict=True)
        )
        pixels = self._rows[:, :, None] * x.shape[3] + self._columns[:, None, :]
        self._pixels = pixels.flatten(1)[:, None].expand(-1, x.shape[1], -1)

    def read(self, image: Tensor) -> Tensor:
        """What is in the window, (N, C, H, W) -> (N, C, pixels)."""
        return image.flatten(2).gather(2, self._pixels)

    def write(self, image: Tensor, values: Tensor) -> Tensor:
        """The image with these values, (N, C, pixels), in the window."""
        return image.flatten(2).scatter(2, self._pixels, values).reshape(image.shape)

    def covers(self, other: _Window) -> Tensor:
        """Which pixels of another window of this size are in this one too, (N, 1, pixels) bool."""
        row, column = (
            _within(theirs - ours[:, :1], ours.shape[1])
            for theirs, ours in ((other._rows, self._rows), (other._columns, self._columns))
        )
        return (row[:, :, None] & column[:, None, :]).flatten(1)[:, None]


def _within(position: Tensor, length: int) -> Tensor:
    return (position >= 0) & (position < length)


def _turned(uniform: Tensor) -> Tensor:
    return (uniform < 0.5).long()


def _length(change: Tensor) -> Tensor:
    """The Euclidean length of each channel, (..., pixels) -> (..., 1)."""
    return change.square().sum(-1, keepdim=True).sqrt()


def _unit(change: Tensor) -> Tensor:
    """Each channel with length one; zero where it is zero."""
    return change / _length(change).clamp(min=torch.finfo(change.dtype).tiny)


def _bumps(height: int, width: int, x: Tensor) -> Tensor:
    """A bump and its turned counterpart, of length one, (2, height, width) in float64."""
    return torch.stack([_bump(height, width, x.device), _bump(width, height, x.device).T])


def _bump(height: int, width: int, device: torch.device) -> Tensor:
    """The upper half a hill, the lower half a valley (equation 2); each of length one before they are put together."""
    upper, lower = _hill(height // 2, width, device), _hill(height - height // 2, width, device)
    return _unit(torch.cat([_unit(upper.flatten()), -_unit(lower.flatten())])).reshape(height, width)


def _hill(height: int, width: int, device: torch.device) -> Tensor:
    """Rings around the centre: the sum of 1 / (k + 1)^2 for k from the number of the ring to the last."""
    row, column = (torch.arange(size, device=device).sub(size // 2).abs() for size in (height, width))
    ring = torch.maximum(row[:, None], column)
    steps = (torch.arange(max(height, width) // 2 + 1, dtype=torch.float64, device=device) + 1) ** -2
    return steps.flip(0).cumsum(0).flip(0)[ring]


_WAYS = {Linf: (_stripes, _coloured), L2: (_tiles, _shifted)}
