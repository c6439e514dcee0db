"""Additive Gaussian noise on every value of the input."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import positive
from robustkit._engine.noise import Noise
from robustkit.defence import Defence
from robustkit.target import Fn

__all__ = ["GaussianNoise"]


@final
class GaussianNoise(Defence):
    """Add normal noise of standard deviation `sigma` to each value, without clipping.

    The derivative is that of the identity, but the gradient of one draw belongs to that draw alone: average several, by
    `draws` of `guard` or by `robustkit.adaptive.eot`. Each output is one draw. Randomised smoothing, a vote over many draws,
    gives a certificate; this defence does not.

    Args:
        sigma: The standard deviation, in input units.

    Raises:
        ArgumentError: `sigma` is not a finite number above zero.

    Source: Cohen, Rosenfeld & Kolter 2019, eq. 1 without the vote (https://arxiv.org/abs/1902.02918). Broken, like other
        defences by randomness alone: Athalye, Carlini & Wagner 2018, section 4.2 (https://arxiv.org/abs/1802.00420).
    """

    stochastic = True

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        positive(sigma=sigma)
        self.sigma = sigma

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x + sigma * noise, (N, *S) -> (N, *S)."""
        normal = torch.randn_like(x) if noise is None else noise.at("pixels").normal(*x.shape[1:]).to(x)
        return x + self.sigma * normal

    def views(self) -> dict[str, Fn]:
        """ "exact": the defence itself."""
        return {"exact": self.forward}

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"sigma={self.sigma}"
