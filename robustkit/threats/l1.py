"""The L1 threat model: the sum of the absolute perturbations is at most eps."""

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
    """The L1 norm of the perturbation is at most eps."""

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The L1 norm of the perturbation, (N,) float64."""
        return norm(x_adv.double() - x.double(), 1)

    def slack(self, x: Tensor) -> Tensor:
        """One rounding error per coordinate: D of them."""
        return self._rounding_error(x) * math.prod(x.shape[1:])

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The Euclidean projection onto the intersection of ball and box; projecting onto one after the other is not."""
        delta = flatten_rows(x_adv).double() - flatten_rows(x).double()
        nearest = l1_nearest(delta.abs(), self._room_in_box(delta, x), self._eps_column(x))
        return self.clamp((flatten_rows(x).double() + delta.sign() * nearest).to(x.dtype).reshape(x.shape))

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """Move the coordinates with the largest gradients, each as far as the box allows, until the budget is spent."""
        delta = l1_steepest(flatten_rows(grad).double().abs(), self._room_in_box(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """A sparse move: the length is divided equally among the 5 % of coordinates with the largest gradients.

        Moving along the gradient wastes the budget on small entries; moving only the largest takes D steps. Source: SLIDE,
        Tramer & Boneh 2019, section 2.2 (https://arxiv.org/abs/1904.13000). Unlike there, coordinates on a face of the box
        that would leave it are skipped.
        """
        weight = flatten_rows(grad).abs() * (self._room_in_box(grad, x_adv) > 0)
        count = max(1, round(0.05 * weight.shape[1]))
        top = weight.topk(count, 1).indices
        chosen = torch.zeros_like(weight).scatter(1, top, 1.0) * (weight > 0)
        share = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
        return self.clamp(x_adv + grad.sign() * as_rows(length, x) * share.to(x).reshape(x.shape))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball, then projected onto the threat set."""
        # D of D + 1 exponentials, divided by the sum of all, are uniform on the solid simplex.
        parts = noise.at("parts").exponential(*x.shape[1:]).to(x)
        rest = noise.at("rest").exponential().double()
        sign = (noise.at("sign").bits(*x.shape[1:]) & 1).to(x) * 2 - 1
        return self.project(x + sign * parts * as_rows(self._eps_column(x)[:, 0] / (norm(parts, 1) + rest), x), x)
