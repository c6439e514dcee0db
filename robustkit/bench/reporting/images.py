"""Images as data URIs."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Bytes", "png", "signed", "to_bytes"]

Bytes = NDArray[np.uint8]

_GREY = 128  # a perturbation of zero


def to_bytes(image: NDArray[np.float32]) -> Bytes:
    """Values in [0, 1] as bytes in [0, 255]."""
    return np.rint(image.astype(np.float64) * 255).astype(np.uint8)


def signed(perturbation: NDArray[Any]) -> tuple[Bytes, float]:
    """A perturbation as a picture, grey + scale * perturbation, and the scale, which is 0 for a perturbation of zero.

    The scale maps the largest value to (nearly) black or white. It is rounded down to two digits, so that the page states
    exactly the scale that it draws.
    """
    largest = float(np.abs(perturbation).max())
    if largest == 0:
        return np.full(perturbation.shape, _GREY, dtype=np.uint8), 0.0
    max_scale = 0.5 / largest
    digits = 1 - math.floor(math.log10(max_scale))
    scale = round(math.floor(max_scale * 10.0**digits) / 10.0**digits, digits)
    return np.clip(_GREY + np.rint(255 * scale * perturbation), 0, 255).astype(np.uint8), scale


def png(image: Bytes) -> str:
    """The image, (C, H, W), as a PNG data URI."""
    # (C, H, W) -> (H, W) or (H, W, 3)
    drawn = Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
    file = io.BytesIO()
    drawn.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
