"""The sparse (L0) threat model on images: at most eps pixel locations are perturbed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import as_rows, flatten_rows
from robustkit.errors import ArgumentError, ShapeError
from robustkit.threats.threat import Threat

__all__ = ["Pixels"]


@final
@dataclass(frozen=True, eq=False)
class Pixels(Threat):
    """At most eps locations of an image (N, C, H, W) are perturbed, all their channels to any valid value."""

    def _eps_range(self) -> tuple[float, float]:
        if self.bounds is None:
            raise ArgumentError("bounds=None: a Pixels threat needs bounds, since a pixel may take any valid value")
        if isinstance(self.eps, float) and not self.eps.is_integer():
            raise ArgumentError(f"eps={self.eps!r} of Pixels must be a whole number: it counts locations")
        return 0.0, math.inf

    @property
    def budget(self) -> float | Tensor:
        """The width of the value range: a step of the whole budget takes a channel from black to white."""
        low, high = self.bounds or (0.0, 1.0)
        return high - low

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The number of locations where any channel differs, (N,) float64."""
        return flatten_rows((_checked_images(x_adv) != x).any(1)).sum(1).double()

    def slack(self, x: Tensor) -> Tensor:
        """Zero: unperturbed locations are equal to x bit for bit."""
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Clamp to the box, then keep the eps locations with the largest squared perturbation: the nearest point."""
        x_adv = self.clamp(x_adv)
        return self._keep((_checked_images(x_adv) - x).double().square().sum(1), x_adv, x)

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The eps locations with the largest gain, each channel at the bound that the gradient points to."""
        room = self._room_in_box(grad, x).reshape(x.shape)
        gain = (_checked_images(grad).double().abs() * room).sum(1)
        low, high = self.bounds or (0.0, 1.0)
        bound = torch.where(grad > 0, torch.full_like(x, high), torch.full_like(x, low))
        return self._keep(gain, torch.where(grad == 0, x, bound), x)

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Move every channel by `length`, then keep the eps locations with the largest gain of the linear function over x.

        A location replaces another one where its new colour gains more, so that a poor random start is left behind; keeping
        the largest perturbations would retain it.
        """
        moved = self.clamp(x_adv + as_rows(length, x) * grad.sign())
        return self._keep((_checked_images(grad).double() * (moved - x)).sum(1), moved, x)

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """eps locations chosen without replacement, each with a uniformly random colour."""
        low, high = self.bounds or (0.0, 1.0)
        colours = low + (high - low) * noise.at("colour").uniform(*x.shape[1:]).to(x)
        return self._keep(noise.at("place").uniform(*_checked_images(x).shape[2:]).double() + 1, self.clamp(colours), x)

    def _keep(self, value: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv` at the eps locations with the largest positive value (N, H, W), x elsewhere."""
        max_eps, locations = int(torch.as_tensor(self.eps).max()), math.prod(value.shape[1:])
        if max_eps > locations > 0:
            raise ArgumentError(f"eps={max_eps} of Pixels exceeds the {locations} locations of the images")
        top = flatten_rows(value).topk(max_eps, 1)
        within_eps = torch.arange(max_eps, device=x.device) < self._eps_column(x)
        mask = torch.zeros_like(flatten_rows(value)).scatter(1, top.indices, ((top.values > 0) & within_eps).double())
        return torch.where(mask.reshape(value.shape).unsqueeze(1) > 0, x_adv, x)


def _checked_images(x: Tensor) -> Tensor:
    """Check that `x` is a batch of images, and return it."""
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; a Pixels threat needs images (N, C, H, W): reshape the data")
    return x
