"""Rounding to a few grey levels, also called bit-depth reduction."""

from __future__ import annotations

from typing import final

from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["Quantise"]


@final
class Quantise(Defence):
    """Each value goes to the nearest of `levels` values, evenly spaced over [0, 1], both ends among them.

    Its derivative is zero almost everywhere, so an attack that follows it learns nothing and the model looks robust. The
    identity in its place tells the way ("bpda"): the defence protects hardly anything.

    Args:
        levels: How many values are left; 2**b for a depth of b bits.

    Raises:
        ArgumentError: `levels` is no whole number from 2 on.

    Source: Xu, Evans & Qi 2018, "Feature squeezing", section III.A (https://arxiv.org/abs/1704.01155), who round a depth
        of b bits as here. Broken by He et al. 2017 (https://arxiv.org/abs/1706.04701).
    """

    def __init__(self, levels: int = 8) -> None:
        super().__init__()
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
            raise ArgumentError(f"levels={levels!r} must be a whole number, at least 2")
        self.levels = levels

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """round(x * (levels - 1)) / (levels - 1), ties to even, (N, *S) -> (N, *S); there is no noise in it."""
        return (x * (self.levels - 1)).round() / (self.levels - 1)

    def views(self) -> dict[str, Fn]:
        """ "bpda": the rounded value with the derivative of the identity; "exact": itself, whose derivative is zero."""
        return {"bpda": bpda(self.forward), "exact": self.forward}

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return f"levels={self.levels}"
