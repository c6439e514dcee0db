"""What attacks on single pixels share: how many each image may change, batch by batch, and how pixels are painted."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit.attack import Attack
from robustkit.errors import ArgumentError, ShapeError
from robustkit.problem import Problem
from robustkit.threats import Pixels, Threat

__all__ = ["Canvas", "PixelAttack", "bell", "by_budget", "check_count"]


@dataclass(frozen=True)
class PixelAttack(Attack):
    """Searches for a few pixels of each image and their colours, seeing scores only.

    Attributes:
        pixels: How many pixels are changed at most; None for as many as the threat allows. An image whose own budget is
            smaller keeps to that.
    """

    access: ClassVar[Literal["white", "score", "label"]] = "score"
    serves: ClassVar[tuple[type[Threat], ...]] = (Pixels,)

    pixels: int | None = None

    def __post_init__(self) -> None:
        at_least(1, pixels=1 if self.pixels is None else self.pixels)

    @abstractmethod
    def search(self, problem: Problem, count: int) -> Tensor:
        """The last images of a search that may change `count` pixels of each, (N, C, H, W); N is at most `problem.most`."""

    @final
    def check(self, threat: Threat) -> None:
        """Refuse other threats, and more pixels than the threat allows any example.

        Raises:
            ArgumentError: With both numbers.
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
        """A search for the images of each budget."""
        x_adv = problem.x.clone()
        for count, rows in by_budget(problem, self.pixels):
            check_count(count, problem.x)
            for first in range(0, len(rows), problem.batch_size):
                part = rows[first : first + problem.batch_size]
                x_adv[part] = self.search(problem[part], count)
        return x_adv


def check_count(count: int, x: Tensor) -> None:
    """Refuse what is no batch of images, or to change every location of them: nothing would be left.

    Raises:
        ShapeError: Data that is not (N, C, H, W).
        ArgumentError: As many pixels as an image has, or more.
    """
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; attacks on pixels need images (N, C, H, W): reshape the data")
    locations = x.shape[2] * x.shape[3]
    if count >= locations:
        raise ArgumentError(f"pixels={count} must be below {locations}, the number of locations of the images; change fewer")


def by_budget(problem: Problem, pixels: int | None) -> Iterator[tuple[int, Tensor]]:
    """The examples by how many pixels each may change, at most `pixels`: that number, from 1 on, and their indices."""
    allowed = torch.as_tensor(problem.threat.eps, dtype=torch.float64, device=problem.x.device).expand(len(problem))
    allowed = (allowed if pixels is None else allowed.clamp(max=pixels)).floor()
    for count in sorted(set(allowed.tolist()) - {0.0}):
        yield int(count), (allowed == count).nonzero().squeeze(1)


@final
class Canvas:
    """Points of the unit cube as images: each of `count` pixels has a row, a column and a colour, 2 + C coordinates.

    Attributes:
        dimensions: Coordinates of a point, count * (2 + C).
        colours: Which of them are colours, (dimensions,) bool.
    """

    def __init__(self, x: Tensor, threat: Threat, count: int) -> None:
        """For images like `x` (N, C, H, W), whose values lie in the bounds of the threat."""
        self._channels, self._height, self._width = x.shape[1:]
        self._threat, self._count = threat, count
        self.dimensions = count * (2 + self._channels)
        self.colours = (torch.arange(2 + self._channels, device=x.device) >= 2).repeat(count)

    def paint(self, x: Tensor, points: Tensor) -> Tensor:
        """`x` (K, C, H, W) with the pixels of `points` (K, dimensions) put in; all else keeps its bits.

        Two pixels at the same place are one, of the colour of the later.
        """
        pixel = points.reshape(len(points), self._count, 2 + self._channels)
        size = torch.tensor([self._height, self._width], device=x.device)
        row, column = (pixel[:, :, :2] * size).long().clamp(max=size - 1).unbind(2)
        place, colour = row * self._width + column, self._colour(pixel[:, :, 2:].to(x))
        if self._count > 1:  # of two numbers for one place a scatter takes either, so both are made the later one
            order = torch.arange(self._count, device=x.device).expand_as(place)
            later = place.new_zeros(len(x), self._height * self._width).scatter_reduce(1, place, order, "amax").gather(1, place)
            colour = colour.gather(1, later.unsqueeze(2).expand_as(colour))
        painted = x.flatten(2).scatter(2, place.unsqueeze(1).expand(-1, self._channels, -1), colour.transpose(1, 2))
        return painted.reshape(x.shape)

    def _colour(self, unit: Tensor) -> Tensor:
        """From [0, 1) to the bounds; the clamp undoes a rounding only."""
        low, high = self._threat.bounds or (0.0, 1.0)
        return self._threat.clamp(low + (high - low) * unit)


def bell(uniform: Tensor) -> Tensor:
    """Colours in [0, 1) of N(128, 127) (of 255) within the range, from uniform numbers in [0, 1) by inversion."""
    ends = torch.tensor([(0 - 128) / 127, (255 - 128) / 127], dtype=torch.float64, device=uniform.device)
    low, high = torch.special.ndtr(ends)
    normal = torch.special.ndtri(low + (high - low) * uniform.double())
    colours: Tensor = ((128 + 127 * normal) / 255).clamp(0, 1 - 2**-24)
    return colours.float()
