"""What the answers of a model look like, whoever asks: no numbers at all, or probabilities where logits are expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit._engine.ledger import Check
from robustkit.target import Fn

__all__ = ["are_probabilities", "check_final_output", "check_first_output", "non_finite_rows", "predict_one"]

_SUM = 1e-3  # by so much a row of probabilities may miss 1


def non_finite_rows(out: object) -> Tensor:
    """Which rows of an output (N, ...), or of a tuple of such, hold a NaN or an infinity, (N,) bool; empty for other things.

    Both infinities count: a logit of minus infinity has no gradient, and hides what the other logits would say.
    """
    parts = out if isinstance(out, tuple | list) else (out,)
    rows = [
        ~part.isfinite().flatten(1).all(1) if part.dim() > 1 else ~part.isfinite()
        for part in parts
        if isinstance(part, Tensor) and part.dim() and part.is_floating_point()
    ]
    return torch.stack(rows).any(0) if rows and len({len(row) for row in rows}) == 1 else torch.zeros(0, dtype=torch.bool)


def are_probabilities(out: Tensor) -> Tensor:
    """Which rows of an output (N, K) are probabilities, (N,) bool: not negative, and one in sum."""
    slack = max(_SUM, torch.finfo(out.dtype).eps)  # in bfloat16 each of them is off by more
    rows: Tensor = (out >= 0).all(1) & ((out.double().sum(1) - 1).abs() <= slack)
    return rows


def check_first_output(out: object) -> list[Check]:
    """What the first answers of a run show without any further question: only what was seen, so mostly nothing."""
    found, lost = [], non_finite_rows(out)
    if lost.any():
        found.append(Check("undefined-outputs", int(lost.sum()), len(lost), 0.0))
    if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1 and out.is_floating_point():
        probabilities = are_probabilities(out)
        if probabilities.any():
            found.append(Check("probabilities", int(probabilities.sum()), len(out)))
    return found


def check_final_output(out: object, level: Tensor) -> list[Check]:
    """What the final answers of a run show: no numbers, or ties by which alone an example is robust.

    Where there is nothing to be told nothing is, so that sound models have no such evidence at all.

    Args:
        out: The answers.
        level: Where the goal is not reached, and yet at its border: two classes share the first place, and the one of the lower
            number is taken, (N,) bool.
    """
    found, lost = [], non_finite_rows(out)
    if lost.any():
        found.append(Check("undefined-outputs", int(lost.sum()), len(lost), 0.0))
    if level.any():
        found.append(Check("tied-outputs", int(level.sum()), len(level), 0.01))
    return found


def predict_one(fn: Fn, x: Tensor) -> tuple[Any, Exception | None]:
    """What is said of one image (1, *S); a model that fails on a batch of one (batch norm in training mode) is asked about two.

    Returns:
        The answer, and what the model raised on the batch of one.

    Raises:
        Exception: The model's own, where it fails on two as well.
    """
    try:
        return fn(x.clone()), None
    except (ValueError, RuntimeError, IndexError) as error:
        try:
            out = fn(x.repeat(2, *[1] * (x.dim() - 1)))
        except (ValueError, RuntimeError, IndexError):
            raise error from None
        return tuple(part[:1] for part in out) if isinstance(out, tuple | list) else out[:1], error
