"""The Euclidean norm of the change is at most eps."""

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
    """The Euclidean length of the change is at most eps."""

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The Euclidean length, (N,) float64."""
        return norm(x_adv.double() - x.double(), 2)

    def slack(self, x: Tensor) -> Tensor:
        """One rounding a coordinate: sqrt(D) of them."""
        return self._rounding(x) * math.sqrt(math.prod(x.shape[1:]))

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Shrunk to the ball, then cut to the box: inside both, though not always the nearest point of both."""
        delta = x_adv - x
        shrink = (self._eps_row(x) / _length(delta)).clamp(max=1.0)
        near = self.clamp(x + delta * as_rows(shrink, x))
        # Where float32 has rounded outwards by more than the size law allows, the change gives way by four roundings.
        outside = self.size(near, x) > self._eps_column(x)[:, 0] + self.slack(x)
        if outside.any():
            near = torch.where(expand_rows(outside, x), self.clamp(x + delta * as_rows(shrink * (1 - 2**-22), x)), near)
        return near

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """Along the gradient; what the box cuts off is spent on the other coordinates. Exact, unlike cutting alone."""
        weight = flatten_rows(grad).double().abs()
        weight = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        delta = l2_steepest(weight, self._room(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Along the gradient."""
        largest = abs_max(grad)
        # Gradients whose squares would vanish or overflow are scaled first; all others keep the bits of other libraries.
        extreme = (largest > 0) & ((largest < 1e-10) | (largest > 1e10))
        grad = grad / as_rows(torch.where(extreme, largest, torch.ones_like(largest)), grad)
        return x_adv + as_rows(length, x) * (grad * as_rows(1 / _length(grad), grad))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball (a random direction, a radius of density r^(D-1)), cut to the box."""
        direction = noise.at("direction").normal(*x.shape[1:]).to(x)
        radius = self._eps_column(x)[:, 0] * noise.at("radius").uniform().double() ** (1 / math.prod(x.shape[1:]))
        return self.project(x + direction * as_rows(radius / norm(direction, 2).clamp(min=1e-12), x), x)


def _length(x: Tensor) -> Tensor:
    """The Euclidean length of each row, (N,), in the operations and the type of other libraries; never quite zero."""
    return flatten_rows(x).square().sum(1).sqrt().clamp(min=1e-12)
