"""Normalisation as a part of the model, where it belongs: attacks then see images as the user does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from robustkit.errors import ArgumentError

__all__ = ["Normalize"]


@final
class Normalize(nn.Module):
    """(x - mean) / std for each channel: `nn.Sequential(Normalize(mean, std), model)` takes images in [0, 1].

    Args:
        mean: One number, or one a channel, in input units.
        std: The same, above zero.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1))
        if not bool((self.std > 0).all()):
            raise ArgumentError(f"std={std!r} must be above zero")

    def forward(self, x: Tensor) -> Tensor:
        """The normalised images, (N, C, H, W) -> (N, C, H, W)."""
        return (x - self.mean.to(x)) / self.std.to(x)
