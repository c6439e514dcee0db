"""Random noise on every pixel."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit.defence import Defence
from robustkit.errors import ArgumentError
from robustkit.target import Fn

__all__ = ["GaussianNoise"]


@final
class GaussianNoise(Defence):
    """Normal noise of a standard deviation `sigma` is added to each value; nothing is cut off.

    Its derivative is that of the identity, but a gradient at one draw tells of that draw only: average several, by `draws` of
    `guard` or by `robustkit.adaptive.eot`. It answers with one draw. Who asks several and lets them vote has randomised
    smoothing, and with it a certificate; this has none.

    Args:
        sigma: The standard deviation, in input units.

    Raises:
        ArgumentError: `sigma` is no number above zero.

    Source: Cohen, Rosenfeld & Kolter 2019, eq. 1 without the vote (https://arxiv.org/abs/1902.02918). Broken where it stands
        alone as all that is random: Athalye, Carlini & Wagner 2018, section 4.2 (https://arxiv.org/abs/1802.00420).
    """

    stochastic = True

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ArgumentError(f"sigma={sigma!r} must be a number above zero")
        self.sigma = sigma

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x + sigma * noise, (N, *S) -> (N, *S)."""
        drawn = torch.randn_like(x) if noise is None else noise.at("pixels").normal(*x.shape[1:]).to(x)
        return x + self.sigma * drawn

    def views(self) -> dict[str, Fn]:
        """ "exact": itself."""
        return {"exact": self.forward}

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return f"sigma={self.sigma}"
