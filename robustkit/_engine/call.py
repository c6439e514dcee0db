"""What surrounds every call of an attack: a look at the arguments, gradients switched on, one batch after another."""

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

__all__ = ["check_request", "detached_copy", "gradients_enabled", "halved", "run_in_batches", "with_halving"]

T = TypeVar("T")


def check_request(x: Tensor, ref: Tensor, goal: Goal, threat: Threat, seed: int, ids: Tensor | None) -> Tensor:
    """The ids, after a look at everything that can be seen to be wrong before any work."""
    for name, value, kind, example in (("goal", goal, Goal, "ClassifyAs()"), ("threat", threat, Threat, "Linf(8 / 255)")):
        if not isinstance(value, kind):
            raise ArgumentError(f"{name}={value!r} must be a {kind.__name__}, for example {example}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ArgumentError(f"x is {found}; inputs must be a floating-point tensor (byte images: x.float() / 255)")
    if x.dim() < 2 or (not x[:1].numel() and len(x)):
        raise ShapeError(f"x has shape {tuple(x.shape)}; inputs must be (N, *S) with at least one value an example")
    if not isinstance(ref, Tensor) or ref.shape[:1] != x.shape[:1]:
        shape = tuple(ref.shape) if isinstance(ref, Tensor) else type(ref).__name__
        raise ShapeError(f"ref is {shape}, x is {tuple(x.shape)}; both must be tensors with one row an example")
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
        raise ShapeError(f"eps has shape {tuple(threat.eps.shape)}; it must be one number, or one an example: ({len(x)},)")


def _check_range(threat: Threat, x: Tensor) -> None:
    """Refuse values outside the bounds, but for one rounding in the type of x."""
    if not len(x):
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    lowest, highest = threat.bounds or (-torch.inf, torch.inf)
    slack = torch.finfo(x.dtype).eps * max(abs(lowest), abs(highest)) if threat.bounds else 0.0
    if not (lowest - slack <= low and high <= highest + slack and low > -torch.inf and high < torch.inf):
        raise ArgumentError(
            f"x has values from {low:g} to {high:g}, outside bounds={threat.bounds}; give images as the model's user "
            "would, with the normalisation inside the model, or state the true bounds in the threat"
        )


def run_in_batches(solve: Callable[[slice, int], T], n: int, size: int) -> tuple[list[T], list[Message]]:
    """`solve` for every slice of at most `size` rows; where memory runs out, half the size is tried from there on."""
    parts, start, most = [], 0, size
    while start < n:
        part, most = with_halving(lambda rows, first=start: solve(slice(first, min(first + rows, n)), rows), most, n - start)  # type: ignore[misc]
        parts.append(part)
        start += most
    return parts, halved(size, most)


def with_halving(work: Callable[[int], T], size: int, n: int) -> tuple[T, int]:
    """`work` on n images with the most at once, `size` or as many as memory allows; and how many these were."""
    while True:
        try:
            return work(size), size
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = -(-min(size, n) // 2)


def halved(wanted: int, most: int) -> list[Message]:
    """What is to be told where fewer images went through the model at once than were wanted."""
    return [] if most == wanted else [Message("batch-halved", f"memory ran out; the last batches held {most} images")]


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Gradients are taken wherever the caller stands, inside torch.no_grad() and torch.inference_mode() too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def detached_copy(x: Tensor) -> Tensor:
    """`x` without its history, as an ordinary tensor."""
    x = x.detach()
    return x.clone() if x.is_inference() else x
