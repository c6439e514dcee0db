"""How each reference model is made: data, architecture, training, and the seed that makes it repeatable."""

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

__all__ = ["RECIPES", "Batches", "Recipe", "build", "one_thread"]


@dataclass(frozen=True)
class Recipe:
    """A reference model from its data to its weights.

    Attributes:
        data: The spec of the held-out data; the model learns from `data:train`.
        net: Makes the network; its weights are drawn from the global generator, which `build` seeds.
        threat: What the card's robust accuracy is measured against.
        epochs: Passes over the training data, by Adam.
        batch: Images in a step.
        lr: The highest learning rate of the one-cycle schedule.
        seed: Of the initial weights, the order and shifts of the images, and the attacks.
        shift: The most pixels by which an image is moved each way.
        attack: Trained against, within `threat`; None trains on clean images.
        warmup: The epochs in which eps grows to that of `threat`, in equal steps.
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


class Batches:
    """Shuffled and shifted batches of some data: another order at each pass, the same ones for the same seed.

    Attributes:
        data: The images, (N, C, H, W).
        batch: Images in a batch; those that fill none are left out of a pass.
        shift: The most pixels by which an image is moved each way; zeros move in.
    """

    def __init__(self, data: Data, batch: int, shift: int, seed: int) -> None:
        self.data, self.batch, self.shift = data, batch, shift
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.data) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self._generator)
        for rows in order[: len(self) * self.batch].reshape(-1, self.batch):
            yield self._shifted(self.data.x[rows]), self.data.y[rows]

    def _shifted(self, x: Tensor) -> Tensor:
        if not self.shift:
            return x
        n, _, height, width = x.shape
        padded = torch.nn.functional.pad(x, [self.shift] * 4)
        down, right = torch.randint(2 * self.shift + 1, (2, n, 1), generator=self._generator)
        rows, columns = down + torch.arange(height), right + torch.arange(width)
        # (N, 1, 1), (N, H, 1) and (N, 1, W) choose the pixels; the channels end up last: (N, H, W, C)
        every = torch.arange(n).reshape(n, 1, 1)
        return padded[every, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def build(recipe: Recipe) -> nn.Module:
    """The trained model in evaluation mode; the same bits for the same recipe, torch and processor family."""
    data = load(f"{recipe.data}:train")
    with one_thread(), fork_rng(recipe.seed):
        model = recipe.net()
        batches = Batches(data, recipe.batch, recipe.shift, recipe.seed)
        optimizer = Adam(model.parameters())
        schedule = OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * len(batches))
        for epoch in range(recipe.epochs):
            loss = standard if recipe.attack is None else partial(madry, attack=recipe.attack, threat=_threat(recipe, epoch))
            fit(model, batches, loss=loss, optimizer=optimizer, epochs=1, schedule=schedule, seed=recipe.seed + epoch)
    return model.eval()


def _threat(recipe: Recipe, epoch: int) -> Threat:
    """The threat of the recipe, smaller during the warm-up."""
    return replace(recipe.threat, eps=recipe.threat.eps * min(1.0, (epoch + 1) / (recipe.warmup + 1)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that sums are formed in one order; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
