"""The interface of threat models: the set of inputs that an adversary may choose from, around each clean input x."""

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

_FLOAT32_ROUNDING = 2.0**-24  # the largest relative error of one float32 operation


@dataclass(frozen=True, eq=False)
class Threat(ABC):
    """The intersection of a ball around each x with the box of valid inputs.

    `project` maps any point into the set. `steepest` returns the maximiser of a linear function over the set. `step` moves
    from any point by a fraction of the budget (`move` by a length); the result may be outside the ball and is projected
    afterwards. `sample` draws a random point.

    Attributes:
        eps: The budget in input units; one number, or one number per example, shape (N,).
        bounds: The lowest and highest valid input value, or None if every real number is valid (latent spaces).

    Raises:
        ArgumentError: `eps` or `bounds` is out of range.
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
                "eps is in input units, so divide by 255 if it was meant for byte images"
            )

    def _eps_range(self) -> tuple[float, float]:
        """The valid range of eps: open at the lower end, closed at the upper end."""
        return 0.0, math.inf

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Threat):
            return False
        eps, other_eps = torch.as_tensor(self.eps), torch.as_tensor(other.eps)
        return eps.shape == other_eps.shape and bool((eps == other_eps).all()) and self.bounds == other.bounds

    def __hash__(self) -> int:
        return hash((type(self), self.bounds))

    @abstractmethod
    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The size of each perturbation in the unit of eps, (N, *S), (N, *S) -> (N,) float64."""

    @abstractmethod
    def slack(self, x: Tensor) -> Tensor:
        """The most that one float32 rounding of every coordinate can add to `size`, (N,) float64."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A point of the threat set, in both ball and box, near `x_adv`."""

    @abstractmethod
    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The point of the threat set that maximises the linear function with gradient `grad`."""

    @abstractmethod
    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Move from `x_adv` by a length in input units so that the linear function with gradient `grad` increases."""

    @abstractmethod
    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """A random point of the threat set."""

    @property
    def budget(self) -> float | Tensor:
        """The length of a step that uses the whole budget, in input units."""
        return self.eps

    @final
    @property
    def free(self) -> Threat:
        """The same ball without a box, with the largest eps of all examples: the set of universal perturbations.

        Raises:
            ArgumentError: The threat needs its box.
        """
        return replace(self, eps=float(torch.as_tensor(self.eps, dtype=torch.float64).max()), bounds=None)

    @final
    def movable(self, grad: Tensor, x: Tensor) -> Tensor:
        """`grad` with zeros where `x` lies on a face of the box and a step along `grad` would leave the box."""
        if self.bounds is None:
            return grad
        low, high = self.bounds
        return torch.where(((x <= low) & (grad < 0)) | ((x >= high) & (grad > 0)), 0, grad)

    @final
    def step(self, grad: Tensor, x_adv: Tensor, x: Tensor, fraction: float, length: float | None = None) -> Tensor:
        """Move by `fraction` of the budget, or by `length` in input units, so that the linear function `grad` increases."""
        # One product of Python floats, as in other libraries; in float32 it would be rounded twice.
        return self.move(grad, x_adv, x, fraction * self.budget if length is None else length)

    @final
    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each x_adv lies in the box and, up to float32 rounding (`slack`), in the ball, (N,) bool."""
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
        """The threat for the examples `rows`."""
        return replace(self, eps=self.eps[rows]) if isinstance(self.eps, Tensor) and self.eps.dim() else self

    @final
    def _rounding_error(self, x: Tensor) -> Tensor:
        """The largest float32 rounding error of one coordinate, (N,) float64."""
        if self.bounds is None:
            return (abs_max(x).double() + 2 * self._eps_column(x)[:, 0]) * _FLOAT32_ROUNDING
        low, high = self.bounds
        largest = max(high - low, -low, high)
        return torch.full((len(x),), largest * _FLOAT32_ROUNDING, dtype=torch.float64, device=x.device)

    @final
    def _room_in_box(self, grad: Tensor, x: Tensor) -> Tensor:
        """The distance of each coordinate to the face of the box in the direction of `grad`, (N, D) float64."""
        x = flatten_rows(x).double()
        if self.bounds is None:
            return torch.full_like(x, torch.inf)
        return torch.where(flatten_rows(grad) > 0, self.bounds[1] - x, x - self.bounds[0]).clamp(min=0)

    @final
    def _eps_row(self, x: Tensor) -> float | Tensor:
        """eps as a number or (N,), in the dtype of x."""
        return self.eps.to(x) if isinstance(self.eps, Tensor) else self.eps

    @final
    def _eps_column(self, x: Tensor) -> Tensor:
        """eps as a column, (N, 1) float64."""
        return torch.as_tensor(self.eps, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)
