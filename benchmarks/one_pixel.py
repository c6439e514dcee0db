"""Pixel attacks on colour images, compared with torchattacks and ART: success, time and forwards on the same images.

    OMP_NUM_THREADS=1 python -m benchmarks.one_pixel --train FILE.npz --data FILE.npz [--images 40] [--rounds 3] [--pixels 1]

One process, one thread, a LeNet-5 that the script trains; in each round all attacks run once, each with its own seed, in a
rotating order. The other libraries attack images one by one internally, so they get one image at a time. Results are judged
here: differences below 1e-5 are set to zero (ART rounds every pixel to bytes), then at most --pixels locations may differ, and
the net must misclassify the image. The result is written to benchmarks/results/one_pixel.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.colour_net import accuracy, colour_net, images
from benchmarks.machine import peak_memory, processor
from robustkit import OnePixel, Pixels, attacks
from robustkit.testing.nets import Counter

RESULT = Path(__file__).parent / "results" / "one_pixel.json"
POPULATION, GENERATIONS = 400, 75
Run = Callable[[nn.Module, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]  # net, x, y, pixels, seed -> x_adv, forwards (N,)


@dataclass(frozen=True)
class Outcome:
    """One attack in one round: seconds per image, forwards (N,), and the success of each image, (N,) bool.

    `success` ignores differences below 1e-5, `to_the_bit` does not. Processor seconds do not depend on other processes.
    """

    seconds: float
    processor_seconds: float
    forwards: np.ndarray
    success: np.ndarray
    to_the_bit: np.ndarray


def wrap_ours(attack: Any) -> Run:
    """Wrap an attack of this package; it runs on all images at once."""

    def run(net: nn.Module, x: Tensor, y: Tensor, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
        counting = Counter(net).eval()
        result = attack(counting, x, y, threat=Pixels(pixels), seed=seed)
        assert counting.seen == int(result.forwards.sum())
        return result.x_adv, result.forwards

    return run


def wrap_peer(make: Callable[[nn.Module, int], Callable[[Tensor, Tensor], Tensor]]) -> Run:
    """Wrap an attack of another library; it runs on one image at a time, with the global random generators."""

    def run(net: nn.Module, x: Tensor, y: Tensor, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
        counting = Counter(net).eval()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        attack, x_adv, forwards = make(counting, pixels), [], []
        for i in range(len(x)):
            before = counting.seen
            x_adv.append(attack(x[i : i + 1], y[i : i + 1]))
            forwards.append(counting.seen - before)
        return torch.cat(x_adv), torch.tensor(forwards)

    return run


def torchattacks(net: nn.Module, pixels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return torchattacks' `OnePixel` with the population and generations of ours."""
    library: Any = importlib.import_module("torchattacks")
    attack: Callable[[Tensor, Tensor], Tensor] = library.OnePixel(net, pixels=pixels, steps=GENERATIONS, popsize=POPULATION)
    return attack


def art(net: nn.Module, pixels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ART's `PixelAttack` with differential evolution; its population is 400."""
    evasion: Any = importlib.import_module("art.attacks.evasion")
    classifier: Any = importlib.import_module("art.estimators.classification")
    wrapped = classifier.PyTorchClassifier(
        net, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = evasion.PixelAttack(wrapped, th=pixels, es=1, max_iter=GENERATIONS, verbose=False)
    return lambda x, y: torch.tensor(attack.generate(x.numpy(), y.numpy()))


def pixel_attacks() -> dict[str, Run]:
    """Return the pixel attacks of installed libraries and of this package."""
    peers = {"torchattacks": ("torchattacks", torchattacks), "art": ("adversarial-robustness-toolbox", art)}
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    runs = {name: wrap_peer(make) for name, (package, make) in peers.items() if package in installed}
    runs["OnePixel"] = wrap_ours(OnePixel(population=POPULATION, generations=GENERATIONS))
    runs["OnePixel, paper"] = wrap_ours(OnePixel(population=POPULATION, generations=100, recipe="paper"))
    for name in ("PixelSearch", "SparseRS"):
        if hasattr(attacks, name):
            runs[name] = wrap_ours(getattr(attacks, name)())
    return runs


def succeeds(net: nn.Module, x: Tensor, y: Tensor, x_adv: Tensor, pixels: int) -> Tensor:
    """Return whether each image differs in at most `pixels` locations, is in the box, and is misclassified, (N,) bool."""
    with torch.no_grad():
        wrong = net(x_adv).argmax(1) != y
    fooled: Tensor = wrong & Pixels(pixels).contains(x_adv, x)
    return fooled


def run_and_judge(run: Run, net: nn.Module, x: Tensor, y: Tensor, pixels: int, seed: int) -> Outcome:
    """Run an attack and judge its result."""
    start, used = time.perf_counter(), time.process_time()
    x_adv, forwards = run(net, x, y, pixels, seed)
    seconds, used = (time.perf_counter() - start) / len(x), (time.process_time() - used) / len(x)
    restored = torch.where((x_adv - x).abs() < 1e-5, x, x_adv)
    both = (succeeds(net, x, y, version, pixels).numpy() for version in (restored, x_adv))
    return Outcome(seconds, used, forwards.numpy(), *both)


def summarise(outcomes: list[Outcome], base: list[Outcome] | None) -> dict[str, Any]:
    """Summarise an attack over all rounds, and compare it with `base` image by image."""
    row: dict[str, Any] = {
        "success": round(median(float(o.success.mean()) for o in outcomes), 4),
        "success_to_the_bit": round(median(float(o.to_the_bit.mean()) for o in outcomes), 4),
        "seconds_an_image": round(median(o.seconds for o in outcomes), 4),
        "processor_seconds_an_image": round(median(o.processor_seconds for o in outcomes), 4),
        "forwards_an_image": _median_of_means(o.forwards for o in outcomes),
        "forwards_where_it_succeeds": _median_of_means(o.forwards[o.success] for o in outcomes),
        "forwards_where_it_fails": _median_of_means(o.forwards[~o.success] for o in outcomes),
    }
    if base is not None:
        pairs = list(zip(outcomes, base, strict=True))
        row |= {
            "over_torchattacks": round(median(own.seconds / other.seconds for own, other in pairs), 3),
            "processor_over_torchattacks": round(median(o.processor_seconds / b.processor_seconds for o, b in pairs), 3),
            "forwards_over_torchattacks": round(median(own.forwards.sum() / other.forwards.sum() for own, other in pairs), 3),
            "only_this": sum(int((own.success & ~other.success).sum()) for own, other in pairs),
            "only_torchattacks": sum(int((other.success & ~own.success).sum()) for own, other in pairs),
        }
    return row


def _median_of_means(rounds: Iterable[np.ndarray]) -> float | None:
    means = [float(forwards.mean()) for forwards in rounds if len(forwards)]
    return round(median(means), 1) if means else None


def measure(net: nn.Module, x: Tensor, y: Tensor, pixels: int, rounds: int) -> dict[str, Any]:
    """Run all attacks in all rounds."""
    runs = pixel_attacks()
    outcomes_of: dict[str, list[Outcome]] = {name: [] for name in runs}
    net(x[:128])
    for turn in range(rounds):
        names = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in names:
            outcomes_of[name].append(run_and_judge(runs[name], net, x, y, pixels, seed=turn))
            last = outcomes_of[name][-1]
            print(
                f"round {turn}: {name}, {last.seconds:.3f} s an image, {last.success.mean():.1%}", file=sys.stderr, flush=True
            )
    base = outcomes_of.get("torchattacks")
    return {name: summarise(outcomes, base) for name, outcomes in outcomes_of.items()}


def memory(options: argparse.Namespace, n: int, population: int) -> float:
    """Return the peak memory in MiB of an attack on n images, minus that of holding images and results."""
    command = [sys.executable, "-m", "benchmarks.one_pixel", "--train", options.train, "--data", options.data]
    command += ["--child", str(n), "--population", str(population)]
    peaks = [
        float(subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout)
        for more in (["--attacked"], [])
    ]
    return round(peaks[0] - peaks[1], 1)


def child_process(options: argparse.Namespace) -> None:
    """Run in the new processes of `memory`."""
    n, net, (x, y) = options.child, colour_net(options.train), images(options.data)
    x, y = x.repeat(-(-n // len(x)), 1, 1, 1)[:n], y.repeat(-(-n // len(y)))[:n]
    with torch.no_grad():
        net(x[:128])  # allocates the memory of the net
    if options.attacked:
        OnePixel(population=options.population, generations=1)(net, x, y, threat=Pixels(1))
    else:
        torch.empty_like(x).copy_(x)  # allocates the memory of the result
    print(peak_memory())


def format_table(rows: dict[str, Any]) -> str:
    """Format the rows as a table."""
    columns = ("success", "seconds_an_image", "forwards_an_image", "forwards_where_it_fails", "over_torchattacks")
    lines = [f"{'':18}" + "".join(f"{name.replace('_', ' '):>25}" for name in columns)]
    lines += [f"{name:18}" + "".join(f"{row.get(key, '')!s:>25}" for key in columns) for name, row in rows.items()]
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same format, with held-out images")
    parser.add_argument("--images", type=int, default=40, help="number of correctly classified images to attack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pixels", type=int, default=1)
    parser.add_argument("--without-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--population", type=int, default=100, help=argparse.SUPPRESS)
    parser.add_argument("--attacked", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all measurements and write the result."""
    options = parse_arguments()
    torch.set_num_threads(1)
    if options.child:
        child_process(options)
        return
    net = colour_net(options.train)
    x, y = images(options.data)
    with torch.no_grad():
        correct = (net(x).argmax(1) == y).nonzero().squeeze(1)[: options.images]
    rows = measure(net, x[correct], y[correct], options.pixels, options.rounds)
    arguments_text = f"--images {len(correct)} --rounds {options.rounds} --pixels {options.pixels}"
    result = {
        "command": f"python -m benchmarks.one_pixel --train FILE.npz --data FILE.npz {arguments_text}",
        "machine": {"processor": processor(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__},
        "setting": {
            "net": "lenet",
            "accuracy": round(accuracy(net, x, y), 4),
            "images": len(correct),
            "rounds": options.rounds,
            "pixels": options.pixels,
            "population": POPULATION,
            "generations": GENERATIONS,
        },
        "attacks": rows,
    }
    if not options.without_memory:
        result["memory beyond inputs and outputs, MiB"] = {
            f"{n} images, population {population}": memory(options, n, population)
            for n, population in ((256, 50), (2_560, 50), (16, 400), (16, 4_000))
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(format_table(rows))
    print(RESULT)


if __name__ == "__main__":
    main()
