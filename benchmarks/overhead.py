"""What does the interface cost? PGD-40 in robustkit, in a hand-written loop, in foolbox and in ART: time, and memory against N.

    make overhead            or            OMP_NUM_THREADS=1 python -m benchmarks.overhead [--colour FILE.npz]

Every value is the median of paired runs on one thread: in each round all contestants run once, in a rotating order. The result
is written to benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.colour_net import residual_body
from benchmarks.machine import peak_memory, processor
from robustkit import PGD, Linf, Result, Target, data, zoo

RESULT = Path(__file__).parent / "results" / "overhead.json"
STEPS, BATCH, IMAGES, ROUNDS = 40, 128, 256, 15
Contestants = dict[str, Callable[[], object]]


class Residual(nn.Module):
    """A small residual net for 32 x 32 colour images: three stages of two blocks, 16 to 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.ModuleList(residual_body(*width) for width in widths)
        self.short = nn.ModuleList(nn.Conv2d(a, b, 1, stride=s, bias=False) if a != b else nn.Identity() for a, b, s in widths)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) -> logits (N, 10)."""
        h = self.stem(x)
        for block, short in zip(self.blocks, self.short, strict=True):
            h = short(h) + block(h)
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels in batches of `BATCH`."""
    for first in range(0, len(x), BATCH):
        yield x[first : first + BATCH], y[first : first + BATCH]


def hand_written(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """PGD as a plain loop, without counting or checks on the way; a last pass computes success, (N,) bool."""
    step, wrong = 2.5 / STEPS * eps, []
    for x0, y0 in batches(x, y):
        x_adv = (x0 + torch.empty_like(x0).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(STEPS):
            x_adv.requires_grad_()
            loss = nn.functional.cross_entropy(model(x_adv), y0, reduction="sum")
            (grad,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + step * grad.sign()
            x_adv = (x0 + (x_adv - x0).clamp(-eps, eps)).clamp(0, 1)
        with torch.no_grad():
            wrong.append(model(x_adv).argmax(1) != y0)
    return torch.cat(wrong)


def hand_written_early_stop(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """The same loop, which removes solved images from the batch: the lowest possible cost of PGD until success."""
    step, wrong = 2.5 / STEPS * eps, []
    for x0, y0 in batches(x, y):
        solved, rows = torch.zeros(len(x0), dtype=torch.bool), torch.arange(len(x0))

        def skip(out: Tensor, *parts: Tensor, solved: Tensor = solved) -> tuple[Tensor, ...]:
            correct = out.argmax(1) == parts[1]
            solved[parts[2][~correct]] = True
            return parts if correct.all() else tuple(part[correct] for part in parts)

        with torch.no_grad():
            x0, y0, rows = skip(model(x0), x0, y0, rows)
        x_adv = (x0 + torch.empty_like(x0).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(STEPS if len(x0) else 0):
            x_adv.requires_grad_()
            out = model(x_adv)
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(out, y0, reduction="sum"), x_adv)
            x_adv = x_adv.detach() + step * grad.sign()
            x_adv = (x0 + (x_adv - x0).clamp(-eps, eps)).clamp(0, 1)
            x0, y0, rows, x_adv = skip(out, x0, y0, rows, x_adv)
            if not len(x0):
                break
        else:
            with torch.no_grad():
                skip(model(x_adv), x0, y0, rows)
        wrong.append(solved)
    return torch.cat(wrong)


def ours(model: nn.Module, x: Tensor, y: Tensor, eps: float, keep: Any) -> Result:
    """The same attack in this package."""
    return PGD(steps=STEPS)(Target(model, batch_size=BATCH), x, y, threat=Linf(eps), keep=keep)


def foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> np.ndarray:
    """The same attack in foolbox, in the same batches."""
    fb: Any = importlib.import_module("foolbox")
    attack, wrong = fb.attacks.LinfPGD(rel_stepsize=2.5 / STEPS, steps=STEPS), []
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device=x.device)
    for x0, y0 in batches(x, y):
        wrong.append(attack(wrapped, x0, y0, epsilons=eps)[2])
    return torch.cat(wrong).numpy()


def art(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> np.ndarray:
    """The same attack in ART, in the same batches."""
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu")
    attack = ProjectedGradientDescent(
        wrapped, eps=eps, eps_step=2.5 / STEPS * eps, max_iter=STEPS, num_random_init=1, batch_size=BATCH, verbose=False
    )
    success: np.ndarray = wrapped.predict(attack.generate(x.numpy(), y.numpy())).argmax(1) != y.numpy()
    return success


def seconds(contestants: Contestants, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Measure the time of each contestant in each round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-1, rounds):  # the first round is a warm-up and is not counted
        names = list(contestants)[turn % 2 :: 1] + list(contestants)[: turn % 2]
        for name in names:
            start = time.perf_counter()
            contestants[name]()
            if turn >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def median_ratio(times: dict[str, list[float]], base: str) -> dict[str, float]:
    """Return the median ratio of each contestant's time to that of `base` in the same round."""
    return {name: round(median(t / b for t, b in zip(own, times[base], strict=True)), 3) for name, own in times.items()}


def measure(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    """Measure all contestants on one model, and the saving that early stopping allows."""
    early_stop = ours(model, x, y, eps, "first")
    # An image that is solved at its t-th step needs t steps; a loop that keeps it in the batch makes all steps.
    needed_share = early_stop.backwards.sum().item() / (STEPS * len(x))
    times = seconds(
        {
            "loop": lambda: hand_written(model, x, y, eps),
            "loop again": lambda: hand_written(model, x, y, eps),
            "early-stop loop": lambda: hand_written_early_stop(model, x, y, eps),
            "robustkit last": lambda: ours(model, x, y, eps, "last"),
            "robustkit first": lambda: ours(model, x, y, eps, "first"),
            "foolbox": lambda: foolbox(model, x, y, eps),
            "art": lambda: art(model, x, y, eps),
        }
    )
    success = {
        "loop": hand_written(model, x, y, eps).float().mean().item(),
        "early-stop loop": hand_written_early_stop(model, x, y, eps).float().mean().item(),
        "robustkit last": ours(model, x, y, eps, "last").success.float().mean().item(),
        "robustkit first": early_stop.success.float().mean().item(),
        "foolbox": float(foolbox(model, x, y, eps).mean()),
        "art": float(art(model, x, y, eps).mean()),
    }
    ratio = median_ratio(times, "loop")
    return {
        "eps": eps,
        "images": len(x),
        "median_seconds": {name: round(median(t), 4) for name, t in times.items()},
        "over_loop": ratio,
        "first_over_early_stop_loop": median_ratio(times, "early-stop loop")["robustkit first"],
        "success": {name: round(rate, 4) for name, rate in success.items()},
        "image_steps_needed": round(needed_share, 4),
        "allowed_over_loop": round(needed_share, 4),
        "faster_than_foolbox": round(1 / median_ratio(times, "foolbox")["robustkit first"], 2),
        "faster_than_art": round(1 / median_ratio(times, "art")["robustkit first"], 2),
    }


def memory(n: int, attacked: bool) -> float:
    """Return the peak memory in MiB of a process that holds n digits and their result, and attacks them or not."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--child", str(n), *(["--attacked"] if attacked else [])]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child_process(n: int, attacked: bool) -> None:
    """Run in the new processes of `memory`."""
    torch.set_num_threads(1)
    model, digits = zoo.load("mnist-cnn"), data.load("mnist-5k")
    x, y = digits.x.repeat(-(-n // 1000), 1, 1, 1)[:n], digits.y.repeat(-(-n // 1000))[:n]
    PGD(steps=2)(model, x[:BATCH], y[:BATCH], threat=Linf(0.1))  # allocates the memory of the model
    if attacked:
        PGD(steps=2)(model, x, y, threat=Linf(0.1))
    else:
        torch.empty_like(x).copy_(x)  # allocates the memory of the result
    print(peak_memory())


def colours(path: str | None) -> tuple[Tensor, Tensor]:
    """Return 32 x 32 colour images: those of a file, or the 20 that foolbox ships."""
    if path:
        part = data.load(f"npz:{path}").part(0, IMAGES)
        return part.x, part.y
    fb: Any = importlib.import_module("foolbox")
    images, labels = fb.samples(fb.PyTorchModel(nn.Identity(), bounds=(0, 1)), dataset="cifar10", batchsize=20)
    return images.repeat(13, 1, 1, 1)[:IMAGES], labels.repeat(13)[:IMAGES].long()


def main() -> None:
    """Run all measurements and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--colour", help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--attacked", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child_process(options.child, options.attacked)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    digits, (colour_x, colour_y) = data.load("mnist-5k").part(0, IMAGES), colours(options.colour)
    small = data.load("digits").part(0, IMAGES)
    net = Residual().eval()
    extra = {n: round(memory(n, attacked=True) - memory(n, attacked=False), 1) for n in (1_000, 10_000, 100_000)}
    result = {
        "command": "python -m benchmarks.overhead" + (" --colour FILE.npz" if options.colour else ""),
        "machine": {"processor": processor(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__},
        "setting": {"steps": STEPS, "batch": BATCH, "images": IMAGES, "rounds": ROUNDS},
        "mnist-cnn, standard": measure(zoo.load("mnist-cnn"), digits.x, digits.y, 0.1),
        "mnist-cnn, robust": measure(zoo.load("mnist-cnn-robust"), digits.x, digits.y, 0.3),
        "digits-mlp, a third of a millisecond per step": measure(zoo.load("digits-mlp"), small.x, small.y, 0.1),
        "residual net, untrained, colours": measure(net, colour_x[:16], colour_y[:16], 8 / 255),
        "memory beyond inputs and outputs, MiB, for N images": extra,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
