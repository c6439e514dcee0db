"""`robustkit train`: a model of the user's, trained in the simplest sound way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import save
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset

from robustkit import data as real_data
from robustkit._engine.state_guard import fork_rng
from robustkit.bench.plan import specs
from robustkit.bench.plan.model_specs import load_model
from robustkit.commands._output import check_new, write_output
from robustkit.errors import ArgumentError
from robustkit.threats import Pixels
from robustkit.training import fit, madry, standard
from robustkit.training.fit import Loss

__all__ = ["TrainOptions", "train_command"]


@final
@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what, and how.

    Attributes:
        model: A factory's spec; training goes on from the weights that it returns.
        data: A data spec.
        loss: "standard", or "madry": on the worst points that an attack finds.
        threat: What that attack may change.
        attack: The attack's spec.
        epochs: How many times all images are seen.
        batch_size: Images a step.
        lr: Of Adam.
        seed: Of random weights, order and noise.
    """

    model: str
    data: str
    loss: str = "madry"
    threat: str | None = None
    attack: str = "pgd:steps=10,reach=2.5"
    epochs: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least 1; leave it out for the default")
        if not 0 < self.lr < float("inf"):
            raise ArgumentError(f"lr={self.lr:g} must be above 0; 0.001 is a good start")
        if self.loss not in ("standard", "madry"):
            raise ArgumentError(f"loss={self.loss!r} does not exist; there are standard and madry")
        if self.loss == "madry" and self.threat is None:
            raise ArgumentError("threat is missing; say against what, for example --threat linf:0.1, or take --loss standard")


def train_command(course: TrainOptions, out: Path) -> None:
    """Train and write the weights, epoch by epoch told on standard output.

    Raises:
        ArgumentError: The file exists or cannot be written, or something in `course` means nothing.
    """
    check_new(out, ".safetensors", "; other formats may execute code")
    held, model = real_data.load(course.data), load_model(course.model)
    _loss(course, 1.0)  # refused now, if it means nothing
    screen = Console()
    with fork_rng(course.seed):
        # A seed for the order of the images apart from the one that the model's own noise draws from.
        order = torch.Generator().manual_seed(course.seed)
        loader = DataLoader(TensorDataset(held.x, held.y), course.batch_size, shuffle=True, generator=order)
        optimizer = Adam(model.parameters(), course.lr)
        for epoch in range(course.epochs):
            # Small nets that meet the whole eps at once often learn nothing, so it grows over the first third.
            share = min(1.0, (epoch + 1) / (course.epochs // 3 + 1))
            (told,) = fit(model, loader, loss=_loss(course, share), optimizer=optimizer, epochs=1, seed=course.seed + epoch)
            line = f"epoch {epoch + 1} of {course.epochs}: loss {told.loss:.4f}, clean accuracy in training {told.accuracy:.1%}"
            screen.print(Text(line), soft_wrap=True)
    _write(model, out)
    if told.accuracy < 2 / len(held.classes):
        word = (
            f"it has hardly learnt anything: one of {len(held.classes)} classes would be right by chance as often; train it by "
        )
        screen.print(Text(word + "--loss standard first, more epochs, another --lr, or a smaller eps", "bold"), soft_wrap=True)
    again = f"robustkit bench --model {course.model}@weights={out} --data {course.data.removesuffix(':train')}"
    screen.print(Text(f"weights: {out}\nmeasure it: {again} --threat {course.threat or 'linf:0.1'}"), soft_wrap=True)


def _loss(course: TrainOptions, share: float) -> Loss:
    """What is made small, at some share of eps."""
    if course.loss == "standard" or course.threat is None:
        return standard
    threat, attack = specs.threat(course.threat), specs.attack(course.attack)
    specs.check_served(course.attack, attack, course.threat, threat)
    if not isinstance(threat, Pixels):
        threat = replace(threat, eps=threat.eps * share)
    return partial(madry, attack=attack, threat=threat)


def _write(model: nn.Module, out: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_output("out", out, save(tensors))
