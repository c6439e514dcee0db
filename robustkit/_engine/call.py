"""What every call of an attack needs: checked arguments, gradients enabled, and batches that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import SupportsIndex, TypeVar

import torch
from torch import Tensor

from robustkit._engine.ledger import Message
from robustkit._engine.state_guard import is_out_of_memory
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Goal
from robustkit.threats import Threat

__all__ = ["check_request", "detached_copy", "gradients_enabled", "halve_to_fit", "halving_notes", "run_in_batches"]

T = TypeVar("T")


def check_request(x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int, ids: Tensor | None) -> Tensor:
    """Check all arguments that can be checked before the model runs, and return the ids, (N,) int64.

    Raises:
        ArgumentError: A value of the wrong type, or inputs outside the threat's bounds.
        ShapeError: Shapes that do not fit each other.
    """
    for name, value, kind, example in (("goal", goal, Goal, "ClassifyAs()"), ("threat", threat, Threat, "Linf(8 / 255)")):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name}={value!r} must be a {kind.__name__}, for example {example}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        dtype = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x is {dtype}; inputs must be a floating-point tensor (byte images: x.float() / 255)")
    if x.dim() < 2 or (not x[:1].numel() and len(x)):
        raise ShapeError(f"x has shape {tuple(x.shape)}; inputs must be (N, *S) with at least one value per example")
    if not isinstance(ref, Tensor) or ref.shape[:1] != x.shape[:1]:
        shape = tuple(ref.shape) if isinstance(ref, Tensor) else type(ref).__name__
        raise ShapeError(f"ref is {shape}, x is {tuple(x.shape)}; both must be tensors with one row per example")
    if not isinstance(seed, SupportsIndex):
        raise ArgumentError(f"seed={seed!r} must be an integer")
    _check_eps(threat, x)
    _check_range(threat, x)
    if ids is None:
        return torch.arange(len(x), device=x.device)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != x.shape[:1]:
        given = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ShapeError(f"ids are {given}; they must be an int64 tensor of shape ({len(x)},)")
    return ids.to(x.device)


def _check_eps(threat: Threat, x: Tensor) -> None:
    if isinstance(threat.eps, Tensor) and threat.eps.dim() and threat.eps.shape != x.shape[:1]:
        raise ShapeError(f"eps has shape {tuple(threat.eps.shape)}; it must be one number, or one per example: ({len(x)},)")


def _check_range(threat: Threat, x: Tensor) -> None:
    """Refuse values outside the bounds; one rounding error in the dtype of x is allowed."""
    if not len(x):
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    lowest, highest = threat.bounds or (-torch.inf, torch.inf)
    slack = torch.finfo(x.dtype).eps * max(abs(lowest), abs(highest)) if threat.bounds else 0.0
    if not (lowest - slack <= low and high <= highest + slack and low > -torch.inf and high < torch.inf):
        raise ArgumentError(
            f"x has values from {low:g} to {high:g}, outside bounds={threat.bounds}; pass unnormalised images, with the "
            "normalisation inside the model, or state the true bounds in the threat"
        )


def run_in_batches(solve: Callable[[slice, int], T], n: int, size: int) -> tuple[list[T], list[Message]]:
    """Run `solve(rows, batch_size)` on slices of at most `size` rows; the size is halved for good when memory runs out.

    Returns:
        The results of the batches, and a note if the size was halved.
    """
    parts, start, batch_size = [], 0, size
    while start < n:
        part, batch_size = halve_to_fit(
            lambda count, first=start: solve(slice(first, min(first + count, n)), count),  # type: ignore[misc]
            batch_size,
            n - start,
        )
        parts.append(part)
        start += batch_size
    return parts, halving_notes(size, batch_size)


def halve_to_fit(run: Callable[[int], T], size: int, n: int) -> tuple[T, int]:
    """`run(size)` on at most n examples; the size is halved while memory runs out. Returns the result and the size used."""
    while True:
        try:
            return run(size), size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = -(-min(size, n) // 2)


def halving_notes(requested: int, used: int) -> list[Message]:
    """A note where batches were smaller than requested."""
    return [] if used == requested else [Message("batch-halved", f"memory ran out; the last batches held {used} images")]


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Enable gradients, also inside a caller's torch.no_grad() or torch.inference_mode()."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def detached_copy(x: Tensor) -> Tensor:
    """`x` detached from its graph; a copy where it is an inference tensor, which autograd refuses."""
    x = x.detach()
    return x.clone() if x.is_inference() else x
