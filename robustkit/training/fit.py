"""A training loop for any model and any loss."""

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

Loss = Callable[..., Tensor]  # (model, x, y) -> scalar; a loss with an argument `seed` gets a new one in every step


@dataclass(frozen=True)
class Epoch:
    """The metrics of one training epoch.

    Attributes:
        loss: Mean training loss over the examples.
        accuracy: Share of clean training examples that the model classified correctly in evaluation mode, measured on each
            batch before its step; NaN unless labels are (N,) int64 and outputs are logits (N, C).
        examples: Number of examples.
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
    """Train `model` in place, in training mode; the training flags of its modules are restored afterwards.

    The loader determines the order of the data, and dropout uses the global generator; seed both to reproduce a training run
    bit for bit.

    Args:
        model: Any module; batches are moved to the device of its first parameter.
        loader: Batches (x, y) of equal length. It is iterated once per epoch, so give a DataLoader or a list, not a
            generator.
        loss: (model, x, y) -> scalar. If it has an argument `seed`, like `partial(madry, attack=..., threat=...)`, it gets a
            different integer in every step, so that no two steps share a random start.
        optimizer: An optimiser of the model's parameters; its state is kept.
        epochs: Number of epochs, at least 1.
        schedule: A learning rate scheduler; stepped after every batch.
        seed: Any integer; runs with different seeds pass different integers to the loss.

    Returns:
        The metrics of each epoch.

    Raises:
        ArgumentError: `epochs` is below 1, or the loader has no batch.
    """
    at_least(1, epochs=epochs)
    history: list[Epoch] = []
    seeds = itertools.count(seed << 32)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for _ in range(epochs):
            model.train()
            history.append(_train_epoch(model, loader, _bind_seed(loss, seeds), optimizer, schedule))
    finally:
        for module, training in modes:
            module.training = training
    return tuple(history)


def _bind_seed(loss: Loss, seeds: Iterator[int]) -> Loss:
    """Return the loss as (model, x, y) -> scalar; it gets the next seed if it has an argument `seed`."""
    if "seed" not in inspect.signature(loss).parameters:
        return loss
    return lambda model, x, y: loss(model, x, y, seed=next(seeds))


def _train_epoch(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], loss: Loss, optimizer: Optimizer, schedule: LRScheduler | None
) -> Epoch:
    total_loss, correct, count = 0.0, 0.0, 0
    for x, y in loader:
        x, y = _to_device_of(model, x), _to_device_of(model, y)
        correct += _count_correct(model, x, y)
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()
        total_loss, count = total_loss + float(value.detach()) * len(x), count + len(x)
    if not count:
        raise ArgumentError("loader gave no batch; it is iterated once per epoch, so give a DataLoader or a list")
    return Epoch(total_loss / count, correct / count, count)


def _to_device_of(model: nn.Module, tensor: Tensor) -> Tensor:
    first = next(model.parameters(), None)
    return tensor if first is None else tensor.to(first.device)


@torch.no_grad()
def _count_correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Count the correctly classified examples in evaluation mode; NaN unless the model is a classifier. State is restored."""
    if y.dtype != torch.int64 or y.dim() != 1:
        return math.nan
    with frozen(model, "eval"), fork_rng(0):
        out = model(x)
    return float((out.argmax(1) == y).sum()) if isinstance(out, Tensor) and out.dim() == 2 else math.nan
