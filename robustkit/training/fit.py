"""One training loop for any model and any loss."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from robustkit._engine.field_checks import at_least
from robustkit._engine.state_guard import fork_rng, frozen
from robustkit.errors import ArgumentError

__all__ = ["Epoch", "Loss", "fit"]

Loss = Callable[..., Tensor]  # (model, x, y) -> scalar; one that has an argument `seed` is given one at every step


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data gave.

    Attributes:
        loss: Mean over the examples of the loss that was descended.
        accuracy: The share of clean training examples that the model, in evaluation mode, classified right just before
            it learned from them; not a number where the labels are no classes (N,) int64 or the outputs no logits (N, C).
        examples: How many examples were seen.
    """

    loss: float
    accuracy: float
    examples: int


def fit(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Loss,
    optimizer: Optimizer,
    epochs: int,
    schedule: LRScheduler | None = None,
    seed: int = 0,
) -> tuple[Epoch, ...]:
    """Train `model` in place, in training mode; its modes are restored afterwards.

    The order of the data is the loader's affair, and random numbers that the model draws (dropout) come from the global
    generator as in any loop: seed both to repeat a training bit for bit.

    Args:
        model: Any module; batches are brought to the device of its first parameter.
        loader: Batches (x, y), the same number of rows in each; gone through once an epoch, so a DataLoader or a list,
            not a generator.
        loss: (model, x, y) -> scalar. One that has an argument `seed`, like `partial(madry, attack=..., threat=...)`, is
            given a different integer at every step, so that no two steps attack from the same random start.
        optimizer: Made for the model's parameters; its state goes on from where it is.
        epochs: How often to go through the data, at least 1.
        schedule: Changes the learning rate; stepped after every batch.
        seed: Any integer; runs of different seeds share none of the integers that the loss is given.

    Returns:
        A record for each epoch.

    Raises:
        ArgumentError: `epochs` is below 1, or the loader gave no batch.
    """
    at_least(1, epochs=epochs)
    history: list[Epoch] = []
    seeds = itertools.count(seed << 32)
    flags = [(part, part.training) for part in model.modules()]
    try:
        for _ in range(epochs):
            model.train()
            history.append(_epoch(model, loader, _with_seed(loss, seeds), optimizer, schedule))
    finally:
        for part, flag in flags:
            part.training = flag
    return tuple(history)


def _with_seed(loss: Loss, seeds: Iterator[int]) -> Loss:
    """The loss as (model, x, y) -> scalar, the next seed given to it if it takes one."""
    if "seed" not in inspect.signature(loss).parameters:
        return loss
    return lambda model, x, y: loss(model, x, y, seed=next(seeds))


def _epoch(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], loss: Loss, optimizer: Optimizer, schedule: LRScheduler | None
) -> Epoch:
    total, right, count = 0.0, 0.0, 0
    for x, y in loader:
        x, y = _beside(model, x), _beside(model, y)
        right += _right(model, x, y)
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total, count = total + float(value.detach()) * len(x), count + len(x)
    if not count:
        raise ArgumentError("loader gave no batch; it is gone through once an epoch, so give a DataLoader or a list")
    return Epoch(total / count, right / count, count)


def _beside(model: nn.Module, tensor: Tensor) -> Tensor:
    first = next(model.parameters(), None)
    return tensor if first is None else tensor.to(first.device)


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """How many of the examples the model classifies right; leaves no trace."""
    if y.dtype != torch.int64 or y.dim() != 1:
        return math.nan
    with frozen(model, "eval"), fork_rng(0):
        out = model(x)
    return float((out.argmax(1) == y).sum()) if isinstance(out, Tensor) and out.dim() == 2 else math.nan
