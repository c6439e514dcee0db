"""The check of inputs for defences on images."""

from __future__ import annotations

from torch import Tensor

from robustkit.errors import ShapeError

__all__ = ["checked_images"]


def checked_images(x: Tensor, min_size: int = 1) -> Tensor:
    """Check that `x` is a batch of images (N, C, H, W) with H and W at least `min_size`, and return it.

    Raises:
        ShapeError: `x` has another shape.
    """
    if x.dim() != 4 or min(x.shape[2:]) < min_size:
        size = f" with H and W at least {min_size}" if min_size > 1 else ""
        raise ShapeError(f"x has shape {tuple(x.shape)}; this defence needs images (N, C, H, W){size}: reshape the data")
    return x
