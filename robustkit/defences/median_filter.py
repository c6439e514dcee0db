"""The median filter, also called spatial smoothing."""

from __future__ import annotations

from typing import final

from torch import Tensor
from torch.nn import functional

from robustkit._engine.field_checks import at_least
from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.defences._images import checked_images
from robustkit.target import Fn

__all__ = ["MedianFilter"]


@final
class MedianFilter(Defence):
    """Replace each pixel by the median of a square window around it, per channel; the border is padded by reflection.

    The filter is differentiable almost everywhere: its derivative (view "exact") is that of the pixel that is the median. In
    flat areas the median is one of many equal pixels, and the choice among them is arbitrary; the identity (view "bpda")
    spreads the gradient over all of them.

    Args:
        size: The side of the window. If it is even, the window extends one pixel further up and left than down and right,
            and the larger of the two middle values is taken.

    Raises:
        ArgumentError: `size` is not an integer of at least 2.
        ShapeError: When called: the inputs are not images, or smaller than the padding allows.

    Source: Xu, Evans & Qi 2018, "Feature squeezing", section III.B (https://arxiv.org/abs/1704.01155), with 2x2 and 3x3.
        Broken by He et al. 2017 (https://arxiv.org/abs/1706.04701), together with rounding.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        at_least(2, size=size)
        self.size = size

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The filtered images, (N, C, H, W) -> (N, C, H, W); `noise` is not used."""
        before, after = self.size // 2, (self.size - 1) // 2
        x = functional.pad(checked_images(x, before + 1), (before, after, before, after), mode="reflect")
        windows = x.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)  # (N, C, H, W, size * size)
        return windows.kthvalue(self.size**2 // 2 + 1, dim=4).values

    def views(self) -> dict[str, Fn]:
        """ "exact": the filter itself; "bpda": its values with the derivative of the identity."""
        return {"exact": self.forward, "bpda": bpda(self.forward)}

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"size={self.size}"
