"""WHAT MAY CHANGE: the set of inputs that an adversary may choose from, around each x."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import abs_max, flatten_rows
from robustkit.errors import ArgumentError

__all__ = ["Threat"]

_ROUNDING = 2.0**-24  # of one float32 operation on numbers of size one


@dataclass(frozen=True, eq=False)
class Threat(ABC):
    """A ball around each x, cut with the box of valid inputs.

    `project` brings any point inside; `steepest` jumps from x to the best point for a linear function, the whole budget at
    once; `step` walks a fraction of the budget from any point (`move` the same by a length), possibly out of the ball, to be
    projected afterwards; `sample` draws a random point.

    Attributes:
        eps: The budget in input units; one number, or one number an example, shape (N,).
        bounds: Lowest and highest valid input value, or None where every real number is valid (latent spaces).
    """

    eps: float | Tensor
    bounds: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.bounds is not None and not (len(self.bounds) == 2 and -math.inf < self.bounds[0] < self.bounds[1] < math.inf):
            raise ArgumentError(f"bounds={self.bounds!r} must be two finite numbers (lowest, highest), or None for no bounds")
        low, high = self._eps_range()
        try:
            eps = torch.as_tensor(self.eps, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            eps = torch.tensor(math.nan)
        if eps.dim() > 1 or not bool(((eps > low) & (eps <= high) & eps.isfinite()).all()):
            rule = f"above {low:g}" + (f" and at most {high:g}" if math.isfinite(high) else " and finite")
            raise ArgumentError(
                f"eps={self.eps!r} of {type(self).__name__} must be a number {rule} for bounds={self.bounds}; "
                "eps is in input units, so divide by 255 where it was meant for byte images"
            )

    def _eps_range(self) -> tuple[float, float]:
        """The open lower and closed upper end of a sensible budget."""
        return 0.0, math.inf

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Threat):
            return False
        one, two = torch.as_tensor(self.eps), torch.as_tensor(other.eps)
        return one.shape == two.shape and bool((one == two).all()) and self.bounds == other.bounds

    def __hash__(self) -> int:
        return hash((type(self), self.bounds))

    @abstractmethod
    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """How much of a budget each change takes, computed in float64, (N, *S), (N, *S) -> (N,)."""

    @abstractmethod
    def slack(self, x: Tensor) -> Tensor:
        """What one float32 rounding of every coordinate may add to `size`, (N,) float64."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the threat set near `x_adv`: into ball and box together."""

    @abstractmethod
    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The point of the threat set that raises the linear function with gradient `grad` most."""

    @abstractmethod
    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """A move of the given length (input units) from `x_adv` that raises the linear function with gradient `grad`."""

    @abstractmethod
    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """A random point of the threat set."""

    @property
    def budget(self) -> float | Tensor:
        """The length of a move of the whole budget, in input units."""
        return self.eps

    @final
    @property
    def free(self) -> Threat:
        """The same ball, of its largest budget, around zero and without a box: where a change that serves all examples lives.

        Raises:
            ArgumentError: A threat that needs its box.
        """
        return replace(self, eps=float(torch.as_tensor(self.eps, dtype=torch.float64).max()), bounds=None)

    @final
    def movable(self, grad: Tensor, x: Tensor) -> Tensor:
        """`grad` without the coordinates in which `x`, at the edge of the box, could only leave it by following it."""
        if self.bounds is None:
            return grad
        low, high = self.bounds
        return torch.where(((x <= low) & (grad < 0)) | ((x >= high) & (grad > 0)), 0, grad)

    @final
    def step(self, grad: Tensor, x_adv: Tensor, x: Tensor, fraction: float, length: float | None = None) -> Tensor:
        """A move of `fraction` of the budget, or of `length` in input units, that raises the linear function `grad`."""
        # One product of Python floats: other libraries form the step so, and float32 would round it twice.
        return self.move(grad, x_adv, x, fraction * self.budget if length is None else length)

    @final
    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each x_adv lies in the box and, but for float32 rounding, in the ball, (N,) bool."""
        inside = self.size(x_adv, x) <= torch.as_tensor(self.eps, dtype=torch.float64, device=x.device) + self.slack(x)
        if self.bounds is not None:
            inside &= (flatten_rows(x_adv) >= self.bounds[0]).all(1) & (flatten_rows(x_adv) <= self.bounds[1]).all(1)
        return inside

    @final
    def clamp(self, x: Tensor) -> Tensor:
        """The nearest point of the box."""
        return x if self.bounds is None else x.clamp(*self.bounds)

    @final
    def __getitem__(self, rows: Tensor | slice) -> Threat:
        """The threat for some of the examples."""
        return replace(self, eps=self.eps[rows]) if isinstance(self.eps, Tensor) and self.eps.dim() else self

    @final
    def _rounding(self, x: Tensor) -> Tensor:
        """One float32 rounding of the data range, (N,) float64."""
        if self.bounds is None:
            return (abs_max(x).double() + 2 * self._eps_column(x)[:, 0]) * _ROUNDING
        low, high = self.bounds
        return torch.full((len(x),), max(high - low, -low, high) * _ROUNDING, dtype=torch.float64, device=x.device)

    @final
    def _room(self, grad: Tensor, x: Tensor) -> Tensor:
        """How far each coordinate can move in the direction of `grad` inside the box, (N, D) float64."""
        x = flatten_rows(x).double()
        if self.bounds is None:
            return torch.full_like(x, torch.inf)
        return torch.where(flatten_rows(grad) > 0, self.bounds[1] - x, x - self.bounds[0]).clamp(min=0)

    @final
    def _eps_row(self, x: Tensor) -> float | Tensor:
        return self.eps.to(x) if isinstance(self.eps, Tensor) else self.eps

    @final
    def _eps_column(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.eps, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)
