"""Arrays as pictures inside a page."""

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

_GREY = 128  # no change


def to_bytes(image: NDArray[np.float32]) -> Bytes:
    """Values in [0, 1] as bytes."""
    return np.rint(image.astype(np.float64) * 255).astype(np.uint8)


def signed(change: NDArray[Any]) -> tuple[Bytes, float]:
    """A signed change as a picture, grey + scale * change, and the scale; scale 0 where nothing changed.

    The scale takes the largest change to (nearly) black or white and is rounded down to two digits, so that what the
    page states is exactly what it draws.
    """
    largest = float(np.abs(change).max())
    if largest == 0:
        return np.full(change.shape, _GREY, dtype=np.uint8), 0.0
    widest = 0.5 / largest
    digits = 1 - math.floor(math.log10(widest))
    scale = round(math.floor(widest * 10.0**digits) / 10.0**digits, digits)
    return np.clip(_GREY + np.rint(255 * scale * change), 0, 255).astype(np.uint8), scale


def png(image: Bytes) -> str:
    """The image, (C, H, W), as a data URI."""
    # (C, H, W) -> (H, W) or (H, W, 3)
    drawn = Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
    file = io.BytesIO()
    drawn.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
