"""How each reference model is trained: data, architecture, hyperparameters and seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import OneCycleLR

from robustkit._engine.state_guard import fork_rng
from robustkit.attack import Attack
from robustkit.attacks import PGD
from robustkit.data import Data, load
from robustkit.threats import Linf, Threat
from robustkit.training import fit, madry, standard
from robustkit.zoo.nets import digits_mlp, mnist_cnn

__all__ = ["RECIPES", "Recipe", "ShiftedBatches", "one_thread", "train_recipe"]


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a reference model.

    Attributes:
        data: The spec of the held-out data; the model is trained on `data:train`.
        net: Makes the network; its weights are drawn from the global generator, which `train_recipe` seeds.
        threat: The threat of adversarial training and of the card's robust accuracy.
        epochs: Number of epochs; the optimiser is Adam.
        batch: Batch size.
        lr: The highest learning rate of the one-cycle schedule.
        seed: Seed of the initial weights, the order and shifts of the images, and the attacks.
        shift: The largest random shift of an image in each direction, in pixels.
        attack: The attack of adversarial training; None trains on clean images.
        warmup: Number of epochs in which eps grows linearly to that of `threat`.
    """

    data: str
    net: Callable[[], nn.Module]
    threat: Linf
    epochs: int
    batch: int
    lr: float
    seed: int = 0
    shift: int = 0
    attack: Attack | None = None
    warmup: int = 0


RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "mnist-cnn": Recipe("mnist-5k", mnist_cnn, Linf(0.1), epochs=15, batch=100, lr=5e-3, shift=2),
        "mnist-cnn-robust": Recipe(
            "mnist-5k", mnist_cnn, Linf(0.3), epochs=60, batch=100, lr=5e-3, shift=2, attack=PGD(steps=7), warmup=20
        ),
        "digits-mlp": Recipe("digits", digits_mlp, Linf(0.1), epochs=30, batch=50, lr=1e-2),
    }
)


class ShiftedBatches:
    """Shuffled batches of randomly shifted images: a new order in each epoch, reproducible by the seed.

    Attributes:
        data: The images, (N, C, H, W).
        batch: Batch size; an incomplete last batch is dropped.
        shift: The largest shift in each direction, in pixels; zeros are padded.
    """

    def __init__(self, data: Data, batch: int, shift: int, seed: int) -> None:
        self.data, self.batch, self.shift = data, batch, shift
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self._generator)
        for rows in order[: len(self) * self.batch].reshape(-1, self.batch):
            yield self._shift_randomly(self.data.x[rows]), self.data.y[rows]

    def _shift_randomly(self, x: Tensor) -> Tensor:
        if not self.shift:
            return x
        n, _, height, width = x.shape
        padded = torch.nn.functional.pad(x, [self.shift] * 4)
        down, right = torch.randint(2 * self.shift + 1, (2, n, 1), generator=self._generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        # Indices (N, 1, 1), (N, H, 1) and (N, 1, W) select pixels; the result has channels last: (N, H, W, C).
        examples = torch.arange(n).reshape(n, 1, 1)
        return padded[examples, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def train_recipe(recipe: Recipe) -> nn.Module:
    """Train a model and return it in evaluation mode; bits repeat for the same recipe, torch and processor family."""
    data = load(f"{recipe.data}:train")
    with one_thread(), fork_rng(recipe.seed):
        model = recipe.net()
        batches = ShiftedBatches(data, recipe.batch, recipe.shift, recipe.seed)
        optimizer = Adam(model.parameters())
        schedule = OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * len(batches))
        for epoch in range(recipe.epochs):
            loss = (
                standard
                if recipe.attack is None
                else partial(madry, attack=recipe.attack, threat=_warmup_threat(recipe, epoch))
            )
            fit(model, batches, loss=loss, optimizer=optimizer, epochs=1, schedule=schedule, seed=recipe.seed + epoch)
    return model.eval()


def _warmup_threat(recipe: Recipe, epoch: int) -> Threat:
    """Return the threat of an epoch: that of the recipe, with a smaller eps during the warm-up."""
    return replace(recipe.threat, eps=recipe.threat.eps * min(1.0, (epoch + 1) / (recipe.warmup + 1)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums have a fixed order; restore the number of threads afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
