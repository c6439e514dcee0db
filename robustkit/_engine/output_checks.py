"""Checks of a model's outputs: values that are not finite, probabilities in place of logits, and ties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit._engine.ledger import Check
from robustkit.target import Fn

__all__ = ["are_probabilities", "check_final_output", "check_first_output", "non_finite_rows", "predict_one"]

_SUM_TOLERANCE = 1e-3  # of the sum of a row of probabilities


def non_finite_rows(out: object) -> Tensor:
    """Which rows of an output (N, ...), or of a tuple of such, hold a NaN or an infinity, (N,) bool; empty for other outputs.

    Minus infinity counts as well: such a logit has no gradient.
    """
    parts = out if isinstance(out, tuple | list) else (out,)
    rows = [
        ~part.isfinite().flatten(1).all(1) if part.dim() > 1 else ~part.isfinite()
        for part in parts
        if isinstance(part, Tensor) and part.dim() and part.is_floating_point()
    ]
    return torch.stack(rows).any(0) if rows and len({len(row) for row in rows}) == 1 else torch.zeros(0, dtype=torch.bool)


def are_probabilities(out: Tensor) -> Tensor:
    """Which rows of an output (N, K) are probabilities, (N,) bool: not negative, with sum one."""
    tolerance = max(_SUM_TOLERANCE, torch.finfo(out.dtype).eps)  # one rounding in bfloat16 is larger than the constant
    rows: Tensor = (out >= 0).all(1) & ((out.double().sum(1) - 1).abs() <= tolerance)
    return rows


def check_first_output(out: object) -> list[Check]:
    """Checks of the first output of a run; only those with hits are returned."""
    checks = _check_finite(out)
    if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1 and out.is_floating_point():
        probabilities = are_probabilities(out)
        if probabilities.any():
            checks.append(Check("probabilities", int(probabilities.sum()), len(out)))
    return checks


def check_final_output(out: object, tied: Tensor) -> list[Check]:
    """Checks of the final outputs of a run; only those with hits are returned.

    Args:
        out: The outputs.
        tied: Which examples are robust by a tie alone, (N,) bool: the largest logit occurs twice, and argmax takes the class
            with the lower index.
    """
    checks = _check_finite(out)
    if tied.any():
        checks.append(Check("tied-outputs", int(tied.sum()), len(tied), 0.01))
    return checks


def _check_finite(out: object) -> list[Check]:
    rows = non_finite_rows(out)
    return [Check("undefined-outputs", int(rows.sum()), len(rows), 0.0)] if rows.any() else []


def predict_one(fn: Fn, x: Tensor) -> tuple[Any, Exception | None]:
    """The output for a batch of one, (1, *S); a model that fails on it (batch norm in training mode) is given two copies.

    Returns:
        The output of one row, and the exception that the model raised on the batch of one, or None.

    Raises:
        Exception: The model's own, where it fails on two copies as well.
    """
    try:
        return fn(x.clone()), None
    except (ValueError, RuntimeError, IndexError) as error:
        try:
            out = fn(x.repeat(2, *[1] * (x.dim() - 1)))
        except (ValueError, RuntimeError, IndexError):
            raise error from None
        return tuple(part[:1] for part in out) if isinstance(out, tuple | list) else out[:1], error
