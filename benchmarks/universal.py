"""Universal perturbations of this package, of ART and of three papers: fooling rate on held-out digits, and time.

    OMP_NUM_THREADS=1 python -m benchmarks.universal [--rounds 3] [--eps 0.2] [--without NAME ...]

One process, one thread, the reference model mnist-cnn; 500 training and 1,000 held-out digits. In each round all contestants
run once, each with its own seed, for ten epochs; ART's deepfool runs two, which take minutes. Every perturbation is clipped to
the ball and scored here: the share of held-out images whose prediction it changes, clamped to the box. The result is written to
benchmarks/results/universal.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.machine import processor
from robustkit import Linf, data, zoo
from robustkit.attacks import UniversalDeepFool, UniversalPGD, UniversalSingular
from robustkit.bench.execution.universal import random_signs

RESULT = Path(__file__).parent / "results" / "universal.json"
TRAIN, HELD_OUT, EPOCHS = 500, 1000, 10
Make = Callable[[nn.Module, Tensor, Tensor, float, int], Tensor]  # net, images, its predictions, eps, seed -> (1, *S)


def wrap_ours(attack: Any) -> Make:
    """Wrap one of our attacks."""
    return lambda net, x, predictions, eps, seed: attack.learn(net, x, predictions, threat=Linf(eps), seed=seed).delta


def wrap_art(inner: str, epochs: int = EPOCHS) -> Make:
    """Wrap ART's `UniversalPerturbation` with an inner attack; it stops early at a fooling rate of 80 %."""

    def make(net: nn.Module, x: Tensor, predictions: Tensor, eps: float, seed: int) -> Tensor:
        evasion, classification = (
            importlib.import_module(f"art.{name}") for name in ("attacks.evasion", "estimators.classification")
        )
        random.seed(seed)
        np.random.seed(seed)
        classifier = classification.PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
        )
        params: dict[str, Any] = {} if inner == "fgsm" else {"verbose": False}
        params |= {} if inner == "deepfool" else {"eps": eps, "eps_step": eps / 4 if inner == "pgd" else eps}
        params |= {"max_iter": 10} if inner == "pgd" else {}
        attack = evasion.UniversalPerturbation(
            classifier,
            attacker=inner,
            attacker_params=params,
            delta=0.2,
            max_iter=epochs,
            eps=eps,
            norm=np.inf,
            batch_size=1,
            verbose=False,
        )
        attack.generate(x.numpy(), functional.one_hot(predictions, 10).numpy())
        return torch.as_tensor(attack.noise, dtype=torch.float32).reshape(1, *x.shape[1:])

    return make


def sign_sgd(net: nn.Module, x: Tensor, predictions: Tensor, eps: float, seed: int) -> Tensor:
    """Plain sign-SGD for ten epochs: from zero, batches of 50, steps of eps / 8."""
    order, delta = torch.Generator().manual_seed(seed), torch.zeros(1, *x.shape[1:])
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=order).split(50):  # type: ignore[no-untyped-call]
            delta.requires_grad_()
            loss = functional.cross_entropy(net((x[rows] + delta).clamp(0, 1)), predictions[rows])
            (grad,) = torch.autograd.grad(loss, delta)
            delta = (delta.detach() + eps / 8 * grad.sign()).clamp(-eps, eps)
    return delta


def sga(net: nn.Module, x: Tensor, predictions: Tensor, eps: float, seed: int) -> Tensor:
    """Stochastic gradient aggregation (Liu et al. 2023, algorithm 1): summed gradients of inner steps give an outer step."""
    order, delta, step = torch.Generator().manual_seed(seed), torch.zeros(1, *x.shape[1:]), eps / 10
    for _ in range(EPOCHS):
        for large in torch.randperm(len(x), generator=order).split(125):  # type: ignore[no-untyped-call]
            inner, total = delta.clone(), torch.zeros_like(delta)
            for _ in range(4 * len(large) // 10):
                rows = large[torch.randint(len(large), (10,), generator=order)]
                inner.requires_grad_()
                loss = functional.cross_entropy(net(x[rows] + inner), predictions[rows], reduction="none").clamp(max=9.0).mean()
                (grad,) = torch.autograd.grad(loss, inner)
                total += grad
                inner = (inner.detach() + step * grad.sign()).clamp(-eps, eps)
            delta = (delta + step * total.sign()).clamp(-eps, eps)
    return delta


def cosine(net: nn.Module, x: Tensor, predictions: Tensor, eps: float, seed: int) -> Tensor:
    """Cosine-UAP (Zhang et al. 2021): minimise the cosine similarity of clean and perturbed logits; Adam, rate eps / 10."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.zeros(1, *x.shape[1:]).uniform_(-eps / 10, eps / 10, generator=generator).requires_grad_()
    steps = torch.optim.Adam([delta], lr=eps / 10)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(50):  # type: ignore[no-untyped-call]
            with torch.no_grad():
                clean = net(x[rows])
            loss = functional.cosine_similarity(net(x[rows] + delta), clean).mean()
            (delta.grad,) = torch.autograd.grad(loss, delta)
            steps.step()
            with torch.no_grad():
                delta.clamp_(-eps, eps)
    return delta.detach()


def generalizable(net: nn.Module, x: Tensor, predictions: Tensor, eps: float, seed: int) -> Tensor:
    """GD-UAP (Mopuri et al. 2018) with data: maximise the activations of all ReLU layers; Adam."""
    generator, activations = torch.Generator().manual_seed(seed), list[Tensor]()
    hooks = [
        part.register_forward_hook(lambda *hook_arguments: activations.append(hook_arguments[2]))
        for part in net.modules()
        if isinstance(part, nn.ReLU)
    ]
    delta = torch.zeros(1, *x.shape[1:]).uniform_(-eps, eps, generator=generator).requires_grad_()
    steps = torch.optim.Adam([delta], lr=eps / 10)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(50):  # type: ignore[no-untyped-call]
            activations.clear()
            net(x[rows] + delta)
            loss = -torch.stack([layer.flatten(1).norm(dim=1).clamp(min=1e-9).log().mean() for layer in activations]).sum()
            (delta.grad,) = torch.autograd.grad(loss, delta)
            steps.step()
            with torch.no_grad():
                delta.clamp_(-eps, eps)
    for hook in hooks:
        hook.remove()
    return delta.detach()


def contestants() -> dict[str, Make]:
    """Return all contestants by name."""
    return {
        "UniversalPGD": wrap_ours(UniversalPGD()),
        "UniversalDeepFool": wrap_ours(UniversalDeepFool()),
        "UniversalSingular, 64 images": wrap_ours(UniversalSingular(images=64)),
        "random signs": lambda net, x, predictions, eps, seed: random_signs(Linf(eps), x[:1], seed, 0),
        "plain sign-SGD": sign_sgd,
        "SGA": sga,
        "Cosine-UAP": cosine,
        "GD-UAP": generalizable,
        "ART fgsm": wrap_art("fgsm"),
        "ART pgd": wrap_art("pgd"),
        "ART deepfool, 2 epochs": wrap_art("deepfool", 2),
    }


def fooling_rate(net: nn.Module, x: Tensor, delta: Tensor, eps: float) -> float:
    """Return the share of images whose prediction the perturbation changes."""
    with torch.no_grad():
        return float((net((x + delta.clamp(-eps, eps)).clamp(0, 1)).argmax(1) != net(x).argmax(1)).double().mean())


def measure(eps: float, rounds: int, without: list[str]) -> dict[str, Any]:
    """Run all rounds; return medians and the values of every round."""
    net = zoo.load("mnist-cnn")
    x = data.load("mnist-5k:train").images(slice(0, TRAIN))
    held_out = data.load("mnist-5k").images(slice(0, HELD_OUT))
    with torch.no_grad():
        predictions = net(x).argmax(1)
    methods = {name: make for name, make in contestants().items() if name not in without}
    rows: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "train": [], "held out": []} for name in methods}
    for number in range(rounds):
        for name, make in methods.items():
            start = time.perf_counter()
            delta = make(net, x, predictions, eps, number)
            seconds = time.perf_counter() - start
            for kind, value in (
                ("seconds", seconds),
                ("train", fooling_rate(net, x, delta, eps)),
                ("held out", fooling_rate(net, held_out, delta, eps)),
            ):
                rows[name][kind].append(value)
            print(f"round {number + 1}: {name}: {rows[name]['held out'][-1]:.1%} held out, {seconds:.2f} s", flush=True)
    return {name: {kind: median(values) for kind, values in row.items()} | {"rounds": row} for name, row in rows.items()}


def main() -> None:
    """Run, print and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eps", type=float, default=0.2)
    parser.add_argument("--without", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.eps, options.rounds, options.without)
    result = {
        "what": f"linf:{options.eps}, mnist-cnn, {TRAIN} training and {HELD_OUT} held-out digits, one thread, "
        f"medians of {options.rounds}",
        "machine": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "art": importlib.metadata.version("adversarial-robustness-toolbox"),
        "contestants": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:30} {row['held out']:7.1%} held out {row['train']:7.1%} training {row['seconds']:9.2f} s")


if __name__ == "__main__":
    main()
