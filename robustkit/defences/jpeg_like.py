"""The lossy core of JPEG: frequencies of 8x8 blocks, rounded to coarse steps."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.defences._images import images
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["JPEGLike"]

_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_SIDE = 8
_FINE = 2.0**20


@final
class JPEGLike(Defence):
    """Each channel as JPEG codes a grey image: the cosine transform of 8x8 blocks, rounded to a table of steps, and back.

    What it leaves out of JPEG: colours are not turned into luminance and chroma, so nothing is subsampled and one table
    serves all channels; the decoded values are cut to [0, 1] but not rounded to bytes; nothing is stored. Sides that are no
    multiple of eight are continued by their last pixel, as encoders do.

    Args:
        quality: From 1 to 100, in the usual scaling of the table; 100 rounds every coefficient to a whole number.

    Raises:
        ArgumentError: `quality` is no whole number in [1, 100].
        ShapeError: When called: the inputs are no images.

    Source: ITU-T T.81 (1992), annex A.3 and table K.1. As a defence Dziugaite, Ghahramani & Roy 2016
        (https://arxiv.org/abs/1608.00853) and Guo et al. 2018 (https://arxiv.org/abs/1711.00117); broken by Shin & Song
        2017, "JPEG-resistant adversarial images", whose cubic is the view "smooth", and by Athalye, Carlini & Wagner 2018
        (https://arxiv.org/abs/1802.00420), whose identity is the view "bpda".
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ArgumentError(f"quality={quality!r} must be a whole number from 1 to 100")
        self.quality = quality

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What is left of images in [0, 1] after coding, (N, C, H, W) -> the same shape; there is no noise in it."""
        return self._coded(x, _nearest)

    def smooth(self, x: Tensor) -> Tensor:
        """The same with round(c) + (c - round(c))^3 in the place of round(c): a close value, and a derivative."""
        return self._coded(x, _cubic)

    def views(self) -> dict[str, Fn]:
        """ "bpda": the coded value with the derivative of the identity; "smooth"; "exact", whose derivative is zero."""
        return {"bpda": bpda(self.forward), "smooth": self.smooth, "exact": self.forward}

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return f"quality={self.quality}"

    def _coded(self, x: Tensor, rounding: Fn) -> Tensor:
        height, width = images(x).shape[2:]
        # In float64: a coefficient between two steps must not depend on how a batch was multiplied.
        pixels = functional.pad(x.double(), (0, -width % _SIDE, 0, -height % _SIDE), mode="replicate") * 255 - 128
        blocks = pixels.unfold(2, _SIDE, _SIDE).unfold(3, _SIDE, _SIDE)  # (N, C, H / 8, W / 8, 8, 8)
        cosines, steps = _cosines().to(x.device), _steps(self.quality).to(x.device)
        coarse = rounding(cosines @ blocks @ cosines.T / steps) * steps
        decoded = (cosines.T @ coarse @ cosines).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        out: Tensor = (decoded[:, :, :height, :width] + 128) / 255
        return out.clamp(0, 1).to(x.dtype)


def _cosines() -> Tensor:
    """The orthonormal cosine transform of eight numbers, (8, 8) float64: row k is the k-th frequency."""
    place = torch.arange(_SIDE, dtype=torch.float64)
    waves = torch.cos(math.pi * (place + 0.5) * place[:, None] / _SIDE) * math.sqrt(2 / _SIDE)
    return torch.cat([waves[:1] / math.sqrt(2), waves[1:]])


def _steps(quality: int) -> Tensor:
    """The table at a quality, (8, 8) float64: whole numbers in [1, 255], as the Independent JPEG Group scales it."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = (torch.tensor(_LUMINANCE, dtype=torch.int64) * scale + 50) // 100
    return table.clamp(1, 255).double()


def _nearest(c: Tensor) -> Tensor:
    """Ties to even; what lies within a millionth of a tie counts as one, since black and white blocks give exact ties."""
    return ((c * _FINE).round() / _FINE).round()


def _cubic(c: Tensor) -> Tensor:
    near = c.detach().round()
    return near + (c - near) ** 3
