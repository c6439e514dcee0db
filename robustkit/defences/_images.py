"""What defences that look at neighbouring pixels ask of their input."""

from __future__ import annotations

from torch import Tensor

from robustkit.errors import ShapeError

__all__ = ["images"]


def images(x: Tensor, at_least: int = 1) -> Tensor:
    """`x` itself, if it is a batch of images (N, C, H, W) with at least so many rows and columns."""
    if x.dim() != 4 or min(x.shape[2:]) < at_least:
        size = f" with H and W at least {at_least}" if at_least > 1 else ""
        raise ShapeError(f"x has shape {tuple(x.shape)}; this defence needs images (N, C, H, W){size}: reshape the data")
    return x
