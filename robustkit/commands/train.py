"""`robustkit train`: standard or adversarial training of a model."""

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
    """The model, the data and the hyperparameters of a training run.

    Attributes:
        model: Spec of a factory; training starts from the weights of the model that it returns.
        data: Data spec.
        loss: "standard", or "madry": the loss on adversarial examples.
        threat: Threat spec of these examples.
        attack: Spec of the attack that makes them.
        epochs: Number of epochs.
        batch_size: Number of images per step.
        lr: Learning rate of Adam.
        seed: Seed of the initial weights, the order and the noise.
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
            raise ArgumentError(
                "threat is missing; give the threat to train against, such as --threat linf:0.1, or --loss standard"
            )


def train_command(options: TrainOptions, out: Path) -> None:
    """Train, print the progress of each epoch, and write the weights.

    Raises:
        ArgumentError: The file exists or cannot be written, or an option is invalid.
    """
    check_new(out, ".safetensors", "; other formats may execute code")
    examples, model = real_data.load(options.data), load_model(options.model)
    _loss(options, 1.0)  # an invalid spec is refused before training
    screen = Console()
    with fork_rng(options.seed):
        # The order of the images has a generator of its own, apart from the one of the model's noise.
        order = torch.Generator().manual_seed(options.seed)
        loader = DataLoader(TensorDataset(examples.x, examples.y), options.batch_size, shuffle=True, generator=order)
        optimizer = Adam(model.parameters(), options.lr)
        for epoch in range(options.epochs):
            # Small nets often learn nothing at the full eps from the start, so eps grows over the first third of the epochs.
            share = min(1.0, (epoch + 1) / (options.epochs // 3 + 1))
            (result,) = fit(model, loader, loss=_loss(options, share), optimizer=optimizer, epochs=1, seed=options.seed + epoch)
            figures = f"loss {result.loss:.4f}, clean accuracy in training {result.accuracy:.1%}"
            screen.print(Text(f"epoch {epoch + 1} of {options.epochs}: {figures}"), soft_wrap=True)
    _write(model, out)
    if result.accuracy < 2 / len(examples.classes):
        warning = (
            f"the model has hardly learnt anything: its accuracy is near the chance of {len(examples.classes)} classes; try "
            "--loss standard first, more epochs, another --lr, or a smaller eps"
        )
        screen.print(Text(warning, "bold"), soft_wrap=True)
    command = f"robustkit bench --model {options.model}@weights={out} --data {options.data.removesuffix(':train')}"
    screen.print(Text(f"weights: {out}\nmeasure it: {command} --threat {options.threat or 'linf:0.1'}"), soft_wrap=True)


def _loss(options: TrainOptions, share: float) -> Loss:
    """The training loss, at a share of eps."""
    if options.loss == "standard" or options.threat is None:
        return standard
    threat, attack = specs.threat(options.threat), specs.attack(options.attack)
    specs.check_served(options.attack, attack, options.threat, threat)
    if not isinstance(threat, Pixels):
        threat = replace(threat, eps=threat.eps * share)
    return partial(madry, attack=attack, threat=threat)


def _write(model: nn.Module, out: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_output("out", out, save(tensors))
