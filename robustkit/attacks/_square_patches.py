"""The proposals of Square: random patches in Linf and L2, for all images of a batch at once.

The last two axes of the data are height and width, all axes before them are channels, and missing axes have size one: a row
of a table is an image of height one.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import expand_rows
from robustkit.threats import L2, Linf, Threat

__all__ = ["initial_point", "patch_shape", "propose", "uniforms_per_example"]

_TILES = 5  # of the L2 start, along the shorter side
_CANCELLED = 1e-6  # the sum of two unit vectors counts as zero below this norm


def initial_point(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """A first point for each of `x` (N, *S) that spends the whole budget, apart from what the box clamps."""
    initial, _ = _BY_THREAT[type(threat)]
    return initial(threat, _images(x), noise).reshape(x.shape)


def uniforms_per_example(threat: Threat, x: Tensor) -> int:
    """The number of random numbers that `propose` needs for each example."""
    return (5 if type(threat) is L2 else 2) + _images(x[:1]).shape[1]


def propose(threat: Threat, x_adv: Tensor, x: Tensor, share: float, uniforms: Tensor) -> Tensor:
    """`x_adv` (N, *S) with a random patch of each replaced; spends the whole budget, apart from what the box clamps.

    Args:
        threat: Linf or L2.
        x_adv: The current points of the search.
        x: The clean inputs.
        share: The share of the image that the patch covers, in (0, 1].
        uniforms: Uniform numbers in [0, 1), (N, `uniforms_per_example`), which give the place and the colours.
    """
    _, proposal = _BY_THREAT[type(threat)]
    return proposal(threat, _images(x_adv), _images(x), share, uniforms).reshape(x.shape)


def patch_shape(share: float, height: int, width: int, min_side: int = 1) -> tuple[int, int]:
    """Height and width of a patch that covers a share of an image: a square, with an odd side if `min_side` is above 1.

    A square larger than the shorter side of the image becomes a rectangle of the same area.
    """
    area = share * height * width
    side = max(min_side, round(math.sqrt(area)))
    side += min_side > 1 and side % 2 == 0
    short, long = sorted((height, width))
    if side <= short:
        return side, side
    longer = min(long, max(side, round(area / short)))
    return (short, longer) if height <= width else (longer, short)


def _images(x: Tensor) -> Tensor:
    """(N, *S) -> (N, C, H, W)."""
    height, width = (1, *x.shape[1:])[-2:]
    return x.reshape(len(x), -1, height, width)


def _signs(uniforms: Tensor, x: Tensor) -> Tensor:
    """Plus and minus one in the dtype of `x`, from uniform numbers in [0, 1)."""
    return 1 - 2 * (uniforms < 0.5).to(x)


def _stripes(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """The Linf start: vertical stripes one pixel wide, each channel of each at one end of the ball."""
    channels, _, width = x.shape[1:]
    return threat.steepest(_signs(noise.uniform(channels, 1, width), x).expand_as(x), x)


def _recolour_patch(threat: Threat, x_adv: Tensor, x: Tensor, share: float, uniforms: Tensor) -> Tensor:
    """A patch in one colour, each channel at one end of the ball (algorithm 2); it always changes the image."""
    patch = _Patch(uniforms[:, :2], patch_shape(share, x.shape[2], x.shape[3]), x)
    current, clean = patch.read(x_adv), patch.read(x)
    signs = _signs(uniforms[:, 2:], x)[:, :, None].expand_as(current)
    colours, opposite = threat.steepest(signs, clean), threat.steepest(-signs, clean)
    unchanged = ~(colours != current).flatten(1).any(1)
    return patch.write(x_adv, torch.where(expand_rows(unchanged, current), opposite, colours))


def _tiles(threat: Threat, x: Tensor, noise: Noise) -> Tensor:
    """The L2 start: adjacent square tiles, each a bump of random sign in each channel."""
    side = max(1, min(x.shape[2:]) // _TILES)
    counts = [size // side for size in x.shape[2:]]
    offsets = [torch.arange(size, device=x.device) - size % side // 2 for size in x.shape[2:]]
    row, column = (offset // side for offset in offsets)
    inside = _in_range(row, counts[0])[:, None] & _in_range(column, counts[1])
    tile = row.clamp(0, counts[0] - 1)[:, None] * counts[1] + column.clamp(0, counts[1] - 1)  # (H, W)
    sign = _signs(noise.at("sign").uniform(x.shape[1], math.prod(counts)), x)[:, :, tile]
    transposed = _is_transposed(noise.at("turn").uniform(math.prod(counts)))[:, tile]
    bump = _bumps(side, side, x)[transposed, (offsets[0] % side)[:, None], offsets[1] % side]
    perturbation = sign * (bump * inside).unsqueeze(1)
    return threat.project(threat.step(perturbation.to(x), x, x, 1.0), x)


def _move_energy(threat: Threat, x_adv: Tensor, x: Tensor, share: float, uniforms: Tensor) -> Tensor:
    """Moves the perturbation of a second patch, and the unspent budget, to a bump added to a first patch (algorithm 3)."""
    size = patch_shape(share, x.shape[2], x.shape[3], min_side=3)
    target, source = _Patch(uniforms[:, :2], size, x), _Patch(uniforms[:, 2:4], size, x)
    perturbation = x_adv - x
    # Patches are small, so float64 costs nothing here.
    in_target = target.read(perturbation).double()
    in_source = source.read(perturbation).double() * ~target.covers(source)
    budget = torch.as_tensor(threat.budget, dtype=torch.float64, device=x.device).reshape(-1, 1, 1)
    spent = perturbation.flatten(1).square().sum(1, dtype=torch.float64)[:, None, None]
    unspent = (budget.square() - spent).clamp(min=0) / x.shape[1]
    available = (_channel_norm(in_target).square() + _channel_norm(in_source).square() + unspent).sqrt()
    bump = _signs(uniforms[:, 5:], in_target)[:, :, None] * _bumps(*size, x).flatten(1)[_is_transposed(uniforms[:, 4])][:, None]
    direction = bump + _unit(in_target)
    direction = torch.where(_channel_norm(direction) < _CANCELLED, bump, direction)
    emptied = source.write(perturbation, torch.zeros_like(in_source).to(x))
    return threat.project(x + target.write(emptied, (_unit(direction) * available).to(x)), x)


@final
class _Patch:
    """One patch per image, all of the same size, each at its own place; it is read from the images and written to them.

    Args:
        uniforms: Uniform numbers in [0, 1), (N, 2), which give the place.
        size: Height and width of the patches.
        x: The images, (N, C, H, W).
    """

    def __init__(self, uniforms: Tensor, size: tuple[int, int], x: Tensor) -> None:
        # In float64, because a product in float32 may be rounded up to the first index out of range.
        first = [
            (uniform * (whole - length + 1)).long()
            for uniform, length, whole in zip(uniforms.double().unbind(1), size, x.shape[2:], strict=True)
        ]
        self._rows, self._columns = (
            start[:, None] + torch.arange(length, device=x.device) for start, length in zip(first, size, strict=True)
        )
        pixels = self._rows[:, :, None] * x.shape[3] + self._columns[:, None, :]
        self._pixels = pixels.flatten(1)[:, None].expand(-1, x.shape[1], -1)

    def read(self, image: Tensor) -> Tensor:
        """The values in the patch, (N, C, H, W) -> (N, C, pixels)."""
        return image.flatten(2).gather(2, self._pixels)

    def write(self, image: Tensor, values: Tensor) -> Tensor:
        """A copy of the image with `values`, (N, C, pixels), in the patch."""
        return image.flatten(2).scatter(2, self._pixels, values).reshape(image.shape)

    def covers(self, other: _Patch) -> Tensor:
        """Which pixels of another patch of this size also lie in this one, (N, 1, pixels) bool."""
        row, column = (
            _in_range(theirs - ours[:, :1], ours.shape[1])
            for theirs, ours in ((other._rows, self._rows), (other._columns, self._columns))
        )
        return (row[:, :, None] & column[:, None, :]).flatten(1)[:, None]


def _in_range(index: Tensor, length: int) -> Tensor:
    return (index >= 0) & (index < length)


def _is_transposed(uniforms: Tensor) -> Tensor:
    """Indices 0 or 1 into `_bumps`, from uniform numbers in [0, 1)."""
    return (uniforms < 0.5).long()


def _channel_norm(values: Tensor) -> Tensor:
    """The Euclidean norm of each channel, (..., pixels) -> (..., 1)."""
    return values.square().sum(-1, keepdim=True).sqrt()


def _unit(values: Tensor) -> Tensor:
    """Each channel scaled to norm one; zero where it is zero."""
    return values / _channel_norm(values).clamp(min=torch.finfo(values.dtype).tiny)


def _bumps(height: int, width: int, x: Tensor) -> Tensor:
    """A bump and its transposed counterpart, each of norm one, (2, height, width) float64."""
    return torch.stack([_bump(height, width, x.device), _bump(width, height, x.device).T])


def _bump(height: int, width: int, device: torch.device) -> Tensor:
    """The upper half a hill, the lower half a valley (equation 2); each half is scaled to norm one first."""
    upper, lower = _hill(height // 2, width, device), _hill(height - height // 2, width, device)
    return _unit(torch.cat([_unit(upper.flatten()), -_unit(lower.flatten())])).reshape(height, width)


def _hill(height: int, width: int, device: torch.device) -> Tensor:
    """Rings around the centre: ring number r has the sum of 1 / (k + 1)^2 for k from r to the last ring."""
    row, column = (torch.arange(size, device=device).sub(size // 2).abs() for size in (height, width))
    ring = torch.maximum(row[:, None], column)
    terms = (torch.arange(max(height, width) // 2 + 1, dtype=torch.float64, device=device) + 1) ** -2
    return terms.flip(0).cumsum(0).flip(0)[ring]


_BY_THREAT = {Linf: (_stripes, _recolour_patch), L2: (_tiles, _move_energy)}
