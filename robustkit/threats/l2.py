"""The L2 threat model: the Euclidean norm of the perturbation is at most eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import abs_max, as_rows, expand_rows, flatten_rows, norm
from robustkit.threats._box import l2_steepest
from robustkit.threats.threat import Threat

__all__ = ["L2"]


@final
@dataclass(frozen=True, eq=False)
class L2(Threat):
    """The Euclidean norm of the perturbation is at most eps."""

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The Euclidean norm of the perturbation, (N,) float64."""
        return norm(x_adv.double() - x.double(), 2)

    def slack(self, x: Tensor) -> Tensor:
        """One rounding error per coordinate: sqrt(D) of them."""
        return self._rounding_error(x) * math.sqrt(math.prod(x.shape[1:]))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Scale to the ball, then clamp to the box: inside both, but not always the nearest point of the intersection."""
        delta = x_adv - x
        factor = (self._eps_row(x) / _norm(delta)).clamp(max=1.0)
        projected = self.clamp(x + delta * as_rows(factor, x))
        # Where float32 has rounded outwards by more than `slack`, the perturbation is scaled down by four roundings.
        outside = self.size(projected, x) > self._eps_column(x)[:, 0] + self.slack(x)
        if outside.any():
            smaller = self.clamp(x + delta * as_rows(factor * (1 - 2**-22), x))
            projected = torch.where(expand_rows(outside, x), smaller, projected)
        return projected

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """Along the gradient; budget that the box cuts off goes to the other coordinates, which makes it exact."""
        weight = flatten_rows(grad).double().abs()
        weight = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        delta = l2_steepest(weight, self._room_in_box(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Along the normalised gradient."""
        largest = abs_max(grad)
        # Only gradients whose squares would underflow or overflow are scaled first; all others match other libraries exactly.
        extreme = (largest > 0) & ((largest < 1e-10) | (largest > 1e10))
        grad = grad / as_rows(torch.where(extreme, largest, torch.ones_like(largest)), grad)
        return x_adv + as_rows(length, x) * (grad * as_rows(1 / _norm(grad), grad))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball (a random direction, a radius of density r^(D-1)), then projected onto the threat set."""
        direction = noise.at("direction").normal(*x.shape[1:]).to(x)
        radius = self._eps_column(x)[:, 0] * noise.at("radius").uniform().double() ** (1 / math.prod(x.shape[1:]))
        return self.project(x + direction * as_rows(radius / norm(direction, 2).clamp(min=1e-12), x), x)


def _norm(x: Tensor) -> Tensor:
    """The Euclidean norm of each row, (N,), at least 1e-12, by the operations and in the dtype of other libraries."""
    return flatten_rows(x).square().sum(1).sqrt().clamp(min=1e-12)
