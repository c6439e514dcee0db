"""Input normalisation as a layer of the model, so that attacks and budgets use the scale of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from robustkit.errors import ArgumentError

__all__ = ["Normalize"]


@final
class Normalize(nn.Module):
    """(x - mean) / std per channel: `nn.Sequential(Normalize(mean, std), model)` takes images in [0, 1].

    Args:
        mean: One number, or one per channel, in input units.
        std: One number, or one per channel, above zero.

    Raises:
        ArgumentError: `std` is not above zero.
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
