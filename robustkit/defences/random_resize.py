"""Random resizing and padding of images."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit.defence import Defence
from robustkit.defences._images import checked_images
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["RandomResize"]


@final
class RandomResize(Defence):
    """Shrink each image by a random factor and pad it with zeros, at a random position, to its original size.

    It is differentiable, but the gradient of one draw belongs to that draw alone: average several, by `draws` of `guard` or
    by `robustkit.adaptive.eot`.

    It differs from the source, which enlarges images of 299 pixels to 299-330 pixels and pads them to the 331 pixels of its
    network. Here the output has the size of the input, so that it fits any network; with `low=0.9` the image fills the same
    share of the frame as there. Sizes and positions are whole pixels, drawn per image; the aspect ratio is kept.
    Interpolation is bilinear, without antialiasing.

    Args:
        low: The smallest scale factor of the sides.
        high: The largest scale factor; 1 keeps the size.

    Raises:
        ArgumentError: Not 0 < low <= high <= 1.
        ShapeError: When called: the inputs are not images.

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
        sides = checked_images(x).shape[2:]
        uniform = torch.rand(len(x), 3, device=x.device) if noise is None else noise.at("size and place").uniform(3)
        scale = self.low + (self.high - self.low) * uniform[:, 0].double()
        rows, columns = (
            _resize_matrix(side, scale, position.double()).to(x).unsqueeze(1)
            for side, position in zip(sides, uniform[:, 1:].unbind(1), strict=True)
        )
        return rows @ x @ columns.mT

    def views(self) -> dict[str, Fn]:
        """ "exact": the defence itself."""
        return {"exact": self.forward}

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"low={self.low}, high={self.high}"


def _resize_matrix(side: int, scale: Tensor, position: Tensor) -> Tensor:
    """Resizing and padding along one side as a matrix per image, (N,), (N,) -> (N, side, side); zero rows are padding.

    Resizing is linear, so one matrix product does it without a loop over sizes, and its rounding does not depend on the batch.
    """
    size = (scale * side).round().clamp(min=1)[:, None, None]
    first = (position[:, None, None] * (side - size + 1)).floor()
    pixel = torch.arange(side, device=scale.device, dtype=torch.float64)
    resized_pixel = pixel[:, None] - first  # the index within the resized image, (N, side, 1)
    source = (resized_pixel + 0.5) * side / size - 0.5  # within the image, since the scale is at most 1
    weights = (1 - (source - pixel).abs()).clamp(min=0)
    return torch.where((resized_pixel >= 0) & (resized_pixel < size), weights, 0)
