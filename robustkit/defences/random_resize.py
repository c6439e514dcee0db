"""Images shrunk to a random size and put at a random place on black."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit.defence import Defence
from robustkit.defences._images import images
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["RandomResize"]


@final
class RandomResize(Defence):
    """Each image is shrunk to a random share of its sides and padded with zeros, at a random place, to the size it had.

    It can be differentiated as it is, but a gradient at one draw tells of that draw only: average several, by `draws` of
    `guard` or by `robustkit.adaptive.eot`.

    The source enlarges images of 299 pixels to 299 up to 330 and pads them to 331, which is what its network takes. Here the
    output has the size of the input, so that any network can stand behind it: with `low=0.9` the image fills the same share
    of the frame as there. Sizes and places are whole pixels, drawn for each image; sides are in proportion. Between pixels it
    is interpolated linearly, without a filter against aliasing.

    Args:
        low: The smallest share of the sides.
        high: The largest; 1 is the image as it is.

    Raises:
        ArgumentError: It does not hold that 0 < low <= high <= 1.
        ShapeError: When called: the inputs are no images.

    Source: Xie et al. 2018, section 3 (https://arxiv.org/abs/1711.01991). Broken by Athalye, Carlini & Wagner 2018, who
        average gradients over draws (https://arxiv.org/abs/1802.00420).
    """

    stochastic = True

    def __init__(self, low: float = 0.9, high: float = 1.0) -> None:
        super().__init__()
        numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in (low, high))
        if not numbers or not 0 < low <= high <= 1:
            raise ArgumentError(f"low={low!r}, high={high!r} must be numbers with 0 < low <= high <= 1")
        self.low, self.high = low, high

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The images resized and padded, (N, C, H, W) -> (N, C, H, W)."""
        sides = images(x).shape[2:]
        drawn = torch.rand(len(x), 3, device=x.device) if noise is None else noise.at("size and place").uniform(3)
        share = self.low + (self.high - self.low) * drawn[:, 0].double()
        down, across = (
            _shrinking(side, share, place.double()).to(x).unsqueeze(1)
            for side, place in zip(sides, drawn[:, 1:].unbind(1), strict=True)
        )
        return down @ x @ across.mT

    def views(self) -> dict[str, Fn]:
        """ "exact": itself."""
        return {"exact": self.forward}

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return f"low={self.low}, high={self.high}"


def _shrinking(side: int, share: Tensor, place: Tensor) -> Tensor:
    """What one side goes through, as a matrix for each image, (N,), (N,) -> (N, side, side); rows of zeros are padding.

    Resizing is linear, so a product says it all: no loop over the sizes, and the same rounding whatever the batch.
    """
    size = (share * side).round().clamp(min=1)[:, None, None]
    first = (place[:, None, None] * (side - size + 1)).floor()
    old = torch.arange(side, device=share.device, dtype=torch.float64)
    new = old[:, None] - first  # which pixel of the shrunk image stands here, (N, side, 1)
    source = (new + 0.5) * side / size - 0.5  # within the image, since it only shrinks
    weights = (1 - (source - old).abs()).clamp(min=0)
    return torch.where((new >= 0) & (new < size), weights, 0)
