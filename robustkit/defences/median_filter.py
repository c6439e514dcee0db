"""The median of each pixel's neighbourhood, also called spatial smoothing."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.nn import functional

from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.defences._images import images
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["MedianFilter"]


@final
class MedianFilter(Defence):
    """Each pixel becomes the median of a square around it, in its own channel; edges are mirrored.

    It has a derivative almost everywhere: that of the one pixel which is the median. The view "exact" follows it. In flat
    areas the median is one of many equal pixels, and which of them gets the derivative says little; the identity in its
    place ("bpda") spreads over all.

    Args:
        size: The side of the square. Of an even one the pixel stands below and right of the middle, and the median is the
            larger of the two in the middle.

    Raises:
        ArgumentError: `size` is no whole number from 2 on.
        ShapeError: When called: the inputs are no images, or smaller than what is mirrored.

    Source: Xu, Evans & Qi 2018, "Feature squeezing", section III.B (https://arxiv.org/abs/1704.01155), with 2x2 and 3x3.
        Broken by He et al. 2017 (https://arxiv.org/abs/1706.04701), together with rounding.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise ArgumentError(f"size={size!r} must be a whole number, at least 2")
        self.size = size

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The medians, (N, C, H, W) -> (N, C, H, W); there is no noise in it."""
        before, after = self.size // 2, (self.size - 1) // 2
        x = functional.pad(images(x, before + 1), (before, after, before, after), mode="reflect")
        squares = x.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)  # (N, C, H, W, size * size)
        return squares.kthvalue(self.size**2 // 2 + 1, dim=4).values

    def views(self) -> dict[str, Fn]:
        """ "exact": itself; "bpda": the median with the derivative of the identity."""
        return {"exact": self.forward, "bpda": bpda(self.forward)}

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return f"size={self.size}"
