"""The absolute changes of all coordinates sum to at most eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import as_rows, flatten_rows, norm
from robustkit.threats._box import l1_nearest, l1_steepest
from robustkit.threats.threat import Threat

__all__ = ["L1"]


@final
@dataclass(frozen=True, eq=False)
class L1(Threat):
    """The absolute changes of all coordinates sum to at most eps."""

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The sum of the absolute changes, (N,) float64."""
        return norm(x_adv.double() - x.double(), 1)

    def slack(self, x: Tensor) -> Tensor:
        """One rounding a coordinate: D of them."""
        return self._rounding(x) * math.prod(x.shape[1:])

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of ball and box together (projecting on one after the other is not)."""
        delta = flatten_rows(x_adv).double() - flatten_rows(x).double()
        nearest = l1_nearest(delta.abs(), self._room(delta, x), self._eps_column(x))
        return self.clamp((flatten_rows(x).double() + delta.sign() * nearest).to(x.dtype).reshape(x.shape))

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The coordinates of the largest gradient, each as far as the box allows, until the budget is spent."""
        delta = l1_steepest(flatten_rows(grad).double().abs(), self._room(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """A sparse move: the length shared equally by the 5 % of coordinates with the largest gradient that have room.

        Moving along the gradient wastes the budget on small entries, moving the largest alone takes D steps. Source:
        SLIDE, Tramer & Boneh 2019, section 2.2 (https://arxiv.org/abs/1904.13000); unlike there, entries at the edge of
        the box that could only leave it are passed over.
        """
        weight = flatten_rows(grad).abs() * (self._room(grad, x_adv) > 0)
        count = max(1, round(0.05 * weight.shape[1]))
        top = weight.topk(count, 1).indices
        chosen = torch.zeros_like(weight).scatter(1, top, 1.0) * (weight > 0)
        share = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        return self.clamp(x_adv + grad.sign() * as_rows(length, x) * share.to(x).reshape(x.shape))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball, brought into the box."""
        # D of D + 1 exponentials over their sum are uniform on the solid simplex.
        parts = noise.at("parts").exponential(*x.shape[1:]).to(x)
        rest = noise.at("rest").exponential().double()
        sign = (noise.at("sign").bits(*x.shape[1:]) & 1).to(x) * 2 - 1
        return self.project(x + sign * parts * as_rows(self._eps_column(x)[:, 0] / (norm(parts, 1) + rest), x), x)
