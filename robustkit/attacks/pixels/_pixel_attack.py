"""The base class of attacks on a few pixels, and the encoding of pixels as points of the unit cube."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit.attack import Attack
from robustkit.attacks.pixels._locations import paint
from robustkit.errors import ArgumentError, ShapeError
from robustkit.problem import Problem
from robustkit.threats import Pixels, Threat

__all__ = ["PixelAttack", "PixelEncoding", "check_images", "normal_colours", "rows_by_budget"]


@dataclass(frozen=True)
class PixelAttack(Attack):
    """Searches for a few pixels of each image and their colours, by scores only.

    Attributes:
        pixels: Largest number of pixels to change; None for as many as the threat allows. An image with a smaller budget of
            its own keeps to that.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "score"
    serves: ClassVar[tuple[type[Threat], ...]] = (Pixels,)

    pixels: int | None = None

    def __post_init__(self) -> None:
        at_least(1, pixels=1 if self.pixels is None else self.pixels)

    @abstractmethod
    def search(self, problem: Problem, count: int) -> Tensor:
        """The last images, (N, C, H, W), of a search that changes up to `count` pixels; N is at most `problem.batch_size`."""

    @final
    def check(self, threat: Threat) -> None:
        """Refuse threats other than Pixels, and more pixels than the threat allows any example.

        Raises:
            ArgumentError: The threat is not supported, or `pixels` is above its largest budget.
        """
        super().check(threat)
        allowed = int(torch.as_tensor(threat.eps).max())
        if self.pixels is not None and self.pixels > allowed:
            raise ArgumentError(
                f"pixels={self.pixels} is more than threat={threat!r} allows, which is {allowed}; "
                "leave pixels out to use as many as the threat allows"
            )

    @final
    def run(self, problem: Problem) -> Tensor:
        """One search for the images of each budget, in batches."""
        x_adv = problem.x.clone()
        for count, rows in rows_by_budget(problem, self.pixels):
            check_images(problem.x, count)
            for first in range(0, len(rows), problem.batch_size):
                batch = rows[first : first + problem.batch_size]
                x_adv[batch] = self.search(problem[batch], count)
        return x_adv


def check_images(x: Tensor, count: int) -> None:
    """Refuse data that are not images, and a budget of all their pixels, which would leave nothing of the image.

    Raises:
        ShapeError: The data are not (N, C, H, W).
        ArgumentError: `count` is at least the number of locations.
    """
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; attacks on pixels need images (N, C, H, W): reshape the data")
    locations = x.shape[2] * x.shape[3]
    if count >= locations:
        raise ArgumentError(f"pixels={count} must be below {locations}, the number of locations of the images; change fewer")


def rows_by_budget(problem: Problem, pixels: int | None) -> Iterator[tuple[int, Tensor]]:
    """Group the examples by how many pixels each may change, at most `pixels`: that number, from 1 on, and their indices."""
    allowed = torch.as_tensor(problem.threat.eps, dtype=torch.float64, device=problem.x.device).expand(len(problem))
    allowed = (allowed if pixels is None else allowed.clamp(max=pixels)).floor()
    for count in sorted(set(allowed.tolist()) - {0.0}):
        yield int(count), (allowed == count).nonzero().squeeze(1)


@final
class PixelEncoding:
    """Encodes `count` pixels as a point of the unit cube: 2 + C coordinates each, for row, column and colour.

    Attributes:
        dimensions: Number of coordinates of a point, count * (2 + C).
        is_colour: Which coordinates are colours, (dimensions,) bool.
    """

    def __init__(self, x: Tensor, threat: Threat, count: int) -> None:
        """For images of the shape of `x` (N, C, H, W), with values in the bounds of the threat."""
        self._channels, self._height, self._width = x.shape[1:]
        self._threat, self._count = threat, count
        self.dimensions = count * (2 + self._channels)
        self.is_colour = (torch.arange(2 + self._channels, device=x.device) >= 2).repeat(count)

    def paint(self, x: Tensor, points: Tensor) -> Tensor:
        """`x` (K, C, H, W) with the pixels of `points` (K, dimensions) replaced; all others keep their bits.

        Of several pixels at one location, the last is painted.
        """
        pixels = points.reshape(len(points), self._count, 2 + self._channels)
        size = torch.tensor([self._height, self._width], device=x.device)
        row, column = (pixels[:, :, :2] * size).long().clamp(max=size - 1).unbind(2)
        location, colour = row * self._width + column, self._colour(pixels[:, :, 2:].to(x))
        if self._count > 1:  # scatter writes any of several values for one location, so all are set to the last
            order = torch.arange(self._count, device=x.device).expand_as(location)
            last = location.new_zeros(len(x), self._height * self._width).scatter_reduce(1, location, order, "amax")
            colour = colour.gather(1, last.gather(1, location).unsqueeze(2).expand_as(colour))
        return paint(x, location, colour)

    def _colour(self, unit: Tensor) -> Tensor:
        """Colours in the bounds, from [0, 1); the clamp only corrects rounding."""
        low, high = self._threat.bounds or (0.0, 1.0)
        return self._threat.clamp(low + (high - low) * unit)


def normal_colours(uniforms: Tensor) -> Tensor:
    """Colours in [0, 1) from N(128, 127) (of 255), truncated to the range, by inversion of uniform numbers in [0, 1)."""
    ends = torch.tensor([(0 - 128) / 127, (255 - 128) / 127], dtype=torch.float64, device=uniforms.device)
    low, high = torch.special.ndtr(ends)
    normal = torch.special.ndtri(low + (high - low) * uniforms.double())
    colours: Tensor = ((128 + 127 * normal) / 255).clamp(0, 1 - 2**-24)
    return colours.float()
