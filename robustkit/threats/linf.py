"""The Linf threat model: every coordinate is perturbed by at most eps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import abs_max, as_rows
from robustkit.threats.threat import Threat

__all__ = ["Linf"]


@final
@dataclass(frozen=True, eq=False)
class Linf(Threat):
    """Every coordinate is perturbed by at most eps."""

    def _eps_range(self) -> tuple[float, float]:
        return 0.0, math.inf if self.bounds is None else self.bounds[1] - self.bounds[0]

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The largest absolute perturbation of a coordinate, (N,) float64."""
        return abs_max(x_adv.double() - x.double())

    def slack(self, x: Tensor) -> Tensor:
        """One rounding error."""
        return self._rounding_error(x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of ball and box, by the operations of other libraries in their order, bit for bit."""
        eps = as_rows(self.eps, x)
        delta = (x_adv - x).clamp(-eps, eps) if isinstance(eps, float | int) else (x_adv - x).clamp(min=-eps, max=eps)
        return self.clamp(x + delta)

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The vertex of the ball in the direction of the gradient's signs (Goodfellow et al. 2015, section 4), projected."""
        return self.project(x + as_rows(self.eps, x) * grad.sign(), x)

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """The same length in every coordinate, in the direction of the gradient's signs."""
        return x_adv + as_rows(length, x) * grad.sign()

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball, then projected onto the threat set."""
        unit = noise.uniform(*x.shape[1:]).to(x) * 2 - 1
        return self.project(x + as_rows(self.eps, x) * unit, x)
