"""Classifiers for the benchmarks: the shipped models, and others that this script trains in a few minutes each.

    OMP_NUM_THREADS=1 python -m benchmarks.classifiers [--train FILE.npz --data FILE.npz]

Standard and adversarial training (Madry et al. 2018) and TRADES (Zhang et al. 2019; here the attack maximises the cross-entropy
instead of the divergence), in Linf and L2, on real digits and, if the files are given, on colour images. Weights are cached in
the folder for temporary files, by a hash of the recipe.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from robustkit import L2, PGD, Linf, data, zoo
from robustkit.attack import Attack
from robustkit.threats import Threat
from robustkit.training import fit, madry, standard
from robustkit.zoo.nets import digits_mlp, mnist_cnn
from robustkit.zoo.recipes import ShiftedBatches

__all__ = ["CLASSIFIERS", "Classifier", "trained_classifier"]

_COLOURS = "colours"
_WARMUP = 0.3  # share of the epochs in which eps grows


def trades(
    model: nn.Module, x: Tensor, y: Tensor, *, attack: Attack, threat: Threat, weight: float = 6.0, seed: int = 0
) -> Tensor:
    """Cross-entropy on clean inputs plus `weight` times the KL divergence between clean and adversarial predictions."""
    x_adv = attack.perturb(model, x, y, threat=threat, seed=seed)
    clean, adversarial = model(x).log_softmax(1), model(x_adv).log_softmax(1)
    return functional.nll_loss(clean, y) + weight * functional.kl_div(
        adversarial, clean, reduction="batchmean", log_target=True
    )


def wide_digits() -> nn.Module:
    """A net with twice the channels of the shipped one, (N, 1, 28, 28) -> (N, 10); 351,786 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def colour_cnn() -> nn.Module:
    """A net with three convolutions, two of them strided, (N, 3, 32, 32) -> (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


@dataclass(frozen=True)
class Classifier:
    """A model, its data, and its threat.

    Attributes:
        name: Name in the tables; for a shipped model, the first word is its name in the zoo.
        data: The spec of the data, or "colours" for the given files.
        threat: The threat of training and evaluation.
        net: Makes the untrained network; None for a shipped model.
        loss: The training loss; None for cross-entropy on clean images.
        epochs: Number of epochs.
        steps: Number of steps of the PGD attack in training.
    """

    name: str
    data: str
    threat: Threat
    net: Callable[[], nn.Module] | None = None
    loss: Callable[..., Tensor] | None = None
    epochs: int = 15
    steps: int = 7

    @property
    def hardened(self) -> bool:
        """Whether it is adversarially trained."""
        return self.loss is not None or self.name.startswith("mnist-cnn-robust")


CLASSIFIERS = (
    Classifier("mnist-cnn", "mnist-5k", Linf(0.1)),
    Classifier("mnist-cnn-robust", "mnist-5k", Linf(0.3)),
    Classifier("mnist-cnn-robust l2", "mnist-5k", L2(2.0)),
    Classifier("digits-mlp", "digits", Linf(0.1)),
    Classifier("digits-mlp pgd", "digits", Linf(0.1), digits_mlp, madry, 60),
    Classifier("mnist wide pgd", "mnist-5k", Linf(0.2), wide_digits, madry, 25),
    Classifier("mnist trades", "mnist-5k", Linf(0.2), mnist_cnn, trades, 25),
    Classifier("mnist l2 pgd", "mnist-5k", L2(1.5), mnist_cnn, madry, 25),
    Classifier("colours", _COLOURS, Linf(2 / 255), colour_cnn, None, 12),
    Classifier("colours pgd", _COLOURS, Linf(4 / 255), colour_cnn, madry, 8, steps=3),
)


def trained_classifier(
    one: Classifier, train: str | None = None, test: str | None = None, count: int = 200
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the trained model in evaluation mode, and its first `count` held-out images with labels."""
    test_data = data.load(f"npz:{test}" if one.data == _COLOURS else one.data).part(limit=count)
    if one.net is None:
        return zoo.load(one.name.split()[0]), test_data.x, test_data.y
    digest = hashlib.sha256(repr((one.name, one.threat, one.epochs, one.steps)).encode()).hexdigest()[:12]
    file = Path(tempfile.gettempdir()) / "robustkit-classifiers" / f"{one.name.replace(' ', '-')}-{digest}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = one.net()
        if file.exists():
            net.load_state_dict(load_file(file))
        else:
            _train(net, one, data.load(f"npz:{train}" if one.data == _COLOURS else f"{one.data}:train"))
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(net.state_dict(), file)
    return net.eval(), test_data.x, test_data.y


def _train(net: nn.Module, one: Classifier, images: data.Data) -> None:
    batches = ShiftedBatches(images, 100, 0 if one.data == "digits" else 2, 0)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=one.epochs * len(batches))
    for epoch in range(one.epochs):
        share = min(1.0, (epoch + 1) / (_WARMUP * one.epochs))
        loss: Callable[..., Tensor] = standard
        if one.loss is not None:
            threat = replace(one.threat, eps=share * float(one.threat.eps))
            loss = partial(one.loss, attack=PGD(steps=one.steps), threat=threat)
        fit(net, batches, loss=loss, optimizer=optimizer, epochs=1, schedule=schedule, seed=epoch)


def main() -> None:
    """Train or load each classifier, and print its accuracies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train", help="npz file with x (N, 32, 32, 3) bytes and y; without it, the models for colour images are skipped"
    )
    parser.add_argument("--data", help="the same format, with held-out images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for one in CLASSIFIERS:
        if one.data == _COLOURS and not options.train:
            continue
        start = time.perf_counter()
        net, x, y = trained_classifier(one, options.train, options.data, 1000)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            clean = float((net(x).argmax(1) == y).float().mean())
        robust = 1 - float(PGD()(net, x[:200], y[:200], threat=one.threat).success.float().mean())
        print(f"{one.name:<18} {one.threat!r:<40} clean {clean:.1%}, under PGD-40 {robust:.1%}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
