"""WHAT MAY CHANGE: the set of inputs that an adversary may choose from, around each x."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from robustkit._box import l1_nearest, l1_steepest, l2_steepest
from robustkit._random import Noise
from robustkit._tensors import amax, as_rows, flat, norm, over
from robustkit.errors import ArgumentError, ShapeError

__all__ = ["L1", "L2", "Linf", "Pixels", "Threat"]

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
            inside &= (flat(x_adv) >= self.bounds[0]).all(1) & (flat(x_adv) <= self.bounds[1]).all(1)
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
            return (amax(x).double() + 2 * self._eps_column(x)[:, 0]) * _ROUNDING
        low, high = self.bounds
        return torch.full((len(x),), max(high - low, -low, high) * _ROUNDING, dtype=torch.float64, device=x.device)

    @final
    def _room(self, grad: Tensor, x: Tensor) -> Tensor:
        """How far each coordinate can move in the direction of `grad` inside the box, (N, D) float64."""
        x = flat(x).double()
        if self.bounds is None:
            return torch.full_like(x, torch.inf)
        return torch.where(flat(grad) > 0, self.bounds[1] - x, x - self.bounds[0]).clamp(min=0)

    @final
    def _eps_row(self, x: Tensor) -> float | Tensor:
        return self.eps.to(x) if isinstance(self.eps, Tensor) else self.eps

    @final
    def _eps_column(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.eps, dtype=torch.float64, device=x.device).reshape(-1, 1).expand(len(x), 1)


@final
@dataclass(frozen=True, eq=False)
class Linf(Threat):
    """Every coordinate may change by at most eps."""

    def _eps_range(self) -> tuple[float, float]:
        return 0.0, math.inf if self.bounds is None else self.bounds[1] - self.bounds[0]

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The largest absolute change, (N,) float64."""
        return amax(x_adv.double() - x.double())

    def slack(self, x: Tensor) -> Tensor:
        """One rounding."""
        return self._rounding(x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of ball and box; in the order of operations of other libraries, bit for bit."""
        eps = as_rows(self.eps, x)
        delta = (x_adv - x).clamp(-eps, eps) if isinstance(eps, float | int) else (x_adv - x).clamp(min=-eps, max=eps)
        return self.clamp(x + delta)

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The corner of the ball in the direction of the signs (Goodfellow et al. 2015, section 4), cut to the box."""
        return self.project(x + as_rows(self.eps, x) * grad.sign(), x)

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """The same length in every coordinate, in the direction of the signs."""
        return x_adv + as_rows(length, x) * grad.sign()

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball, cut to the box."""
        unit = noise.uniform(*x.shape[1:]).to(x) * 2 - 1
        return self.project(x + as_rows(self.eps, x) * unit, x)


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
            near = torch.where(over(outside, x), self.clamp(x + delta * as_rows(shrink * (1 - 2**-22), x)), near)
        return near

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """Along the gradient; what the box cuts off is spent on the other coordinates. Exact, unlike cutting alone."""
        weight = flat(grad).double().abs()
        weight = weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        delta = l2_steepest(weight, self._room(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """Along the gradient."""
        largest = amax(grad)
        # Gradients whose squares would vanish or overflow are scaled first; all others keep the bits of other libraries.
        extreme = (largest > 0) & ((largest < 1e-10) | (largest > 1e10))
        grad = grad / as_rows(torch.where(extreme, largest, torch.ones_like(largest)), grad)
        return x_adv + as_rows(length, x) * (grad * as_rows(1 / _length(grad), grad))

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        """Uniform in the ball (a random direction, a radius of density r^(D-1)), cut to the box."""
        direction = noise.at("direction").normal(*x.shape[1:]).to(x)
        radius = self._eps_column(x)[:, 0] * noise.at("radius").uniform().double() ** (1 / math.prod(x.shape[1:]))
        return self.project(x + direction * as_rows(radius / norm(direction, 2).clamp(min=1e-12), x), x)


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
        delta = flat(x_adv).double() - flat(x).double()
        nearest = l1_nearest(delta.abs(), self._room(delta, x), self._eps_column(x))
        return self.clamp((flat(x).double() + delta.sign() * nearest).to(x.dtype).reshape(x.shape))

    def steepest(self, grad: Tensor, x: Tensor) -> Tensor:
        """The coordinates of the largest gradient, each as far as the box allows, until the budget is spent."""
        delta = l1_steepest(flat(grad).double().abs(), self._room(grad, x), self._eps_column(x))
        return self.clamp(x + grad.sign() * delta.to(x).reshape(x.shape))

    def move(self, grad: Tensor, x_adv: Tensor, x: Tensor, length: float | Tensor) -> Tensor:
        """A sparse move: the length shared equally by the 5 % of coordinates with the largest gradient that have room.

        Moving along the gradient wastes the budget on small entries, moving the largest alone takes D steps. Source:
        SLIDE, Tramer & Boneh 2019, section 2.2 (https://arxiv.org/abs/1904.13000); unlike there, entries at the edge of
        the box that could only leave it are passed over.
        """
        weight = flat(grad).abs() * (self._room(grad, x_adv) > 0)
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
        return flat((_image(x_adv) != x).any(1)).sum(1).double()

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
        top = flat(value).topk(most, 1)
        within = torch.arange(most, device=x.device) < self._eps_column(x)
        chosen = torch.zeros_like(flat(value)).scatter(1, top.indices, ((top.values > 0) & within).double())
        return torch.where(chosen.reshape(value.shape).unsqueeze(1) > 0, x_adv, x)


def _length(x: Tensor) -> Tensor:
    """The Euclidean length of each row, (N,), in the operations and the type of other libraries; never quite zero."""
    return flat(x).square().sum(1).sqrt().clamp(min=1e-12)


def _image(x: Tensor) -> Tensor:
    """`x` itself, if it is a batch of images."""
    if x.dim() != 4:
        raise ShapeError(f"x has shape {tuple(x.shape)}; a Pixels threat needs images (N, C, H, W): reshape the data")
    return x
