"""The lossy part of JPEG: the discrete cosine transform of 8x8 blocks, with quantised coefficients."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from robustkit._engine.field_checks import at_least
from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.defences._images import checked_images
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
_BLOCK = 8
_TIE_RESOLUTION = 2.0**20


@final
class JPEGLike(Defence):
    """Compress and decompress each channel as JPEG does a grey image: transform 8x8 blocks, quantise, transform back.

    It differs from JPEG: colours are not converted to luminance and chroma, so nothing is subsampled and one table serves
    all channels; the decoded values are clipped to [0, 1] but not rounded to bytes; there is no entropy coding. Sides that
    are not a multiple of eight are padded by repeating the last pixel, as encoders do.

    Args:
        quality: From 1 to 100, with the usual scaling of the table; 100 rounds every coefficient to a whole number.

    Raises:
        ArgumentError: `quality` is not an integer in [1, 100].
        ShapeError: When called: the inputs are not images.

    Source: ITU-T T.81 (1992), annex A.3 and table K.1. As a defence Dziugaite, Ghahramani & Roy 2016
        (https://arxiv.org/abs/1608.00853) and Guo et al. 2018 (https://arxiv.org/abs/1711.00117); broken by Shin & Song
        2017, "JPEG-resistant adversarial images", whose cubic rounding is the view "smooth", and by Athalye, Carlini &
        Wagner 2018 (https://arxiv.org/abs/1802.00420), whose identity backward pass is the view "bpda".
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        at_least(1, 100, quality=quality)
        self.quality = quality

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The decompressed images in [0, 1], (N, C, H, W) -> (N, C, H, W); `noise` is not used."""
        return self._compress(x, _round)

    def smooth(self, x: Tensor) -> Tensor:
        """A differentiable approximation: round(c) + (c - round(c))^3 in place of round(c)."""
        return self._compress(x, _cubic_round)

    def views(self) -> dict[str, Fn]:
        """ "bpda": the exact values with the derivative of the identity; "smooth"; "exact", whose derivative is zero."""
        return {"bpda": bpda(self.forward), "smooth": self.smooth, "exact": self.forward}

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"quality={self.quality}"

    def _compress(self, x: Tensor, rounding: Fn) -> Tensor:
        height, width = checked_images(x).shape[2:]
        # In float64, so that the rounding of a coefficient does not depend on the order of sums in a batched product.
        pixels = functional.pad(x.double(), (0, -width % _BLOCK, 0, -height % _BLOCK), mode="replicate") * 255 - 128
        blocks = pixels.unfold(2, _BLOCK, _BLOCK).unfold(3, _BLOCK, _BLOCK)  # (N, C, H / 8, W / 8, 8, 8)
        dct, steps = _dct_matrix().to(x.device), _quantisation_table(self.quality).to(x.device)
        coefficients = rounding(dct @ blocks @ dct.T / steps) * steps
        decoded = (dct.T @ coefficients @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        out: Tensor = (decoded[:, :, :height, :width] + 128) / 255
        return out.clamp(0, 1).to(x.dtype)


def _dct_matrix() -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II) of eight numbers, (8, 8) float64: row k is the k-th frequency."""
    index = torch.arange(_BLOCK, dtype=torch.float64)
    rows = torch.cos(math.pi * (index + 0.5) * index[:, None] / _BLOCK) * math.sqrt(2 / _BLOCK)
    return torch.cat([rows[:1] / math.sqrt(2), rows[1:]])


def _quantisation_table(quality: int) -> Tensor:
    """The step size of each coefficient, (8, 8) float64, whole numbers in [1, 255]; scaling of the Independent JPEG Group."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    table = (torch.tensor(_LUMINANCE, dtype=torch.int64) * scale + 50) // 100
    return table.clamp(1, 255).double()


def _round(c: Tensor) -> Tensor:
    """Round, ties to even; values within a millionth of a tie count as ties, since black and white blocks give exact ties."""
    return ((c * _TIE_RESOLUTION).round() / _TIE_RESOLUTION).round()


def _cubic_round(c: Tensor) -> Tensor:
    """round(c) + (c - round(c))^3, with derivative 3 (c - round(c))^2."""
    rounded = c.detach().round()
    return rounded + (c - rounded) ** 3
