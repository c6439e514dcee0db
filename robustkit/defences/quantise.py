"""Quantisation to a few levels, also called bit-depth reduction."""

from __future__ import annotations

from typing import final

from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.target import Fn

__all__ = ["Quantise"]


@final
class Quantise(Defence):
    """Round each value to the nearest of `levels` values that are evenly spaced over [0, 1], both ends included.

    The derivative is zero almost everywhere, so a gradient attack on it fails and the model appears robust. With the
    derivative of the identity (view "bpda") the defence protects hardly anything.

    Args:
        levels: Number of levels; 2**b for a depth of b bits.

    Raises:
        ArgumentError: `levels` is not an integer of at least 2.

    Source: Xu, Evans & Qi 2018, "Feature squeezing", section III.A (https://arxiv.org/abs/1704.01155), whose rounding to b
        bits is the same. Broken by He et al. 2017 (https://arxiv.org/abs/1706.04701).
    """

    def __init__(self, levels: int = 8) -> None:
        super().__init__()
        at_least(2, levels=levels)
        self.levels = levels

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """round(x * (levels - 1)) / (levels - 1), ties to even, (N, *S) -> (N, *S); `noise` is not used."""
        return (x * (self.levels - 1)).round() / (self.levels - 1)

    def views(self) -> dict[str, Fn]:
        """ "bpda": the rounded values with the derivative of the identity; "exact": the rounding, with derivative zero."""
        return {"bpda": bpda(self.forward), "exact": self.forward}

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"levels={self.levels}"
