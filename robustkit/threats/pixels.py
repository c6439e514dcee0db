"""At most eps locations of an image may change."""

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
    """At most eps locations may change, all their channels to any valid value; for images (N, C, H, W)."""

    def _eps_range(self) -> tuple[float, float]:
        if self.bounds is None:
            raise ArgumentError("bounds=None: a Pixels threat needs bounds, since a pixel may take any valid value")
        if isinstance(self.eps, float) and not self.eps.is_integer():
            raise ArgumentError(f"eps={self.eps!r} of Pixels must be a whole number: it counts locations")
        return 0.0, math.inf

    @property
    def budget(self) -> float | Tensor:
        """The width of the value range: a move of the whole budget takes a channel from black to white."""
        low, high = self.bounds or (0.0, 1.0)
        return high - low

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The number of locations where any channel differs, (N,) float64."""
        return flatten_rows((_image(x_adv) != x).any(1)).sum(1).double()

    def slack(self, x: Tensor) -> Tensor:
        """None: untouched locations keep their bits."""
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Cut to the box, then the eps locations of largest squared change are kept: the nearest point of the set."""
        x_adv = self.clamp(x_adv)
        return self._keep((_image(x_adv) - x).double().square().sum(1), x_adv, x)

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The eps locations of largest gain, each channel at the bound that the gradient points to."""
        room = self._room(grad, x).reshape(x.shape)
        gain = (_image(grad).double().abs() * room).sum(1)
        low, high = self.bounds or (0.0, 1.0)
        edge = torch.where(grad > 0, torch.full_like(x, high), torch.full_like(x, low))
        return self._keep(gain, torch.where(grad == 0, x, edge), x)

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Every channel moved by `length`; then the eps locations that raise the linear function most, seen from x.

        A location enters where its new colour is worth more than that of one already changed, so that a poor random
        start is left behind; keeping the largest changes would hold on to it.
        """
        moved = self.clamp(x_adv + as_rows(length, x) * grad.sign())
        return self._keep((_image(grad).double() * (moved - x)).sum(1), moved, x)

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """eps locations chosen without replacement, each of a uniformly random colour."""
        low, high = self.bounds or (0.0, 1.0)
        colours = low + (high - low) * noise.at("colour").uniform(*x.shape[1:]).to(x)
        return self._keep(noise.at("place").uniform(*_image(x).shape[2:]).double() + 1, self.clamp(colours), x)

    def _keep(self, value: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv` at the eps locations of largest positive value (N, H, W), x elsewhere."""
        most = int(torch.as_tensor(self.eps).max())
        if most > math.prod(value.shape[1:]) > 0:
            raise ArgumentError(f"eps={most} of Pixels exceeds the {math.prod(value.shape[1:])} locations of the images")
        top = flatten_rows(value).topk(most, 1)
        within = torch.arange(most, device=x.device) < self._eps_column(x)
        chosen = torch.zeros_like(flatten_rows(value)).scatter(1, top.indices, ((top.values > 0) & within).double())
        return torch.where(chosen.reshape(value.shape).unsqueeze(1) > 0, x_adv, x)


def _image(x: Tensor) -> Tensor:
    """`x` itself, if it is a batch of images."""
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; a Pixels threat needs images (N, C, H, W): reshape the data")
    return x
