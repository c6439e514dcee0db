"""Tensor operations on batches; every function maps the rows independently."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "abs_max",
    "as_rows",
    "at_least_float32",
    "dot",
    "expand_rows",
    "flatten_rows",
    "nan_to_inf",
    "norm",
    "round_towards",
]


def flatten_rows(x: Tensor) -> Tensor:
    """Flatten each row, (N, *S) -> (N, D)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def as_rows(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one number per example (N,), reshaped to broadcast over `x` (N, *S), in its dtype."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value


def expand_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (N,) bool, reshaped to broadcast over `x` (N, *S)."""
    return mask.reshape(-1, *[1] * (x.dim() - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each pair of rows, (N, *S), (N, *S) -> (N,)."""
    return (flatten_rows(a) * flatten_rows(b)).sum(1)


def norm(x: Tensor, p: float) -> Tensor:
    """The p-norm of each row in float64, (N, *S) -> (N,)."""
    norms: Tensor = torch.linalg.vector_norm(flatten_rows(x), p, dim=1, dtype=torch.float64)
    return norms


def abs_max(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (N, *S) -> (N,); NaN where the row holds a NaN."""
    return flatten_rows(x).abs().amax(1)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself, but float32 where it has half precision, which cannot represent small steps."""
    return x.float() if x.element_size() < 4 else x


def round_towards(y: Tensor, x: Tensor) -> Tensor:
    """`y` rounded to the half-precision dtype of `x` without moving away from `x`, as rounding to nearest may do."""
    nearest = y.to(x.dtype)
    x_wide = x.to(y.dtype)
    too_far = (nearest.to(y.dtype) - x_wide).abs() > (y - x_wide).abs()
    # Half-precision numbers of one sign are ordered as their bits: subtracting one is one step towards zero.
    bits = nearest.view(torch.int16)
    away_from_zero = (nearest > x) == (nearest > 0)
    return torch.where(too_far, torch.where(away_from_zero, bits - 1, bits + 1).view(x.dtype), nearest)


def nan_to_inf(loss: Tensor) -> Tensor:
    """Losses in float64, with NaN replaced by infinity, the worst value."""
    return torch.where(loss.isnan(), torch.inf, loss.double())
