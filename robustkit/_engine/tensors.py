"""Per-example arithmetic: every function here maps the rows of a batch independently."""

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
    """The batch as a matrix, (N, *S) -> (N, D)."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def as_rows(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one number an example (N,), made to broadcast over `x` (N, *S)."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value


def expand_rows(mask: Tensor, x: Tensor) -> Tensor:
    """One answer an example (N,) bool, made to broadcast over `x` (N, *S)."""
    return mask.reshape(-1, *[1] * (x.dim() - 1))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each pair of rows, (N, *S), (N, *S) -> (N,)."""
    return (flatten_rows(a) * flatten_rows(b)).sum(1)


def norm(x: Tensor, p: float) -> Tensor:
    """The p-norm of each row in float64, (N, *S) -> (N,)."""
    lengths: Tensor = torch.linalg.vector_norm(flatten_rows(x), p, dim=1, dtype=torch.float64)
    return lengths


def abs_max(x: Tensor) -> Tensor:
    """The largest absolute value of each row, (N, *S) -> (N,); not a number where the row holds one."""
    return flatten_rows(x).abs().amax(1)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in a type with room for small steps: half precision becomes float32."""
    return x.float() if x.element_size() < 4 else x


def round_towards(y: Tensor, x: Tensor) -> Tensor:
    """`y` rounded to the half-precision type of `x` and never further from `x` than it was; nearest would be."""
    near = y.to(x.dtype)
    wide = x.to(y.dtype)
    too_far = (near.to(y.dtype) - wide).abs() > (y - wide).abs()
    # Half-precision numbers of one sign are ordered like their bits: one bit less is one step towards zero.
    bits = near.view(torch.int16)
    outward = (near > x) == (near > 0)
    return torch.where(too_far, torch.where(outward, bits - 1, bits + 1).view(x.dtype), near)


def nan_to_inf(loss: Tensor) -> Tensor:
    """Losses in float64, what is not a number as the worst of all."""
    return torch.where(loss.isnan(), torch.inf, loss.double())
