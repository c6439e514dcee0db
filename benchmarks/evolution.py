"""Is our evolution scipy's? One pixel, the same images, net and budget: the paired difference of the success rates.

    OMP_NUM_THREADS=1 python -m benchmarks.evolution --train FILE.npz --data FILE.npz [--images 500] [--rounds 3]

In each round both have a seed of their own for each image. Every candidate that is looked at may be the success, in both.
Equivalent are the two where the whole 95 % interval of the difference lies within 3 points. The result goes to
benchmarks/results/evolution.json.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from scipy.optimize import differential_evolution
from torch import Tensor, nn

from benchmarks.colour_net import accuracy, colour_net, images
from benchmarks.machine import processor
from robustkit import OnePixel, Pixels
from robustkit.bench.statistics.intervals import tango

RESULT = Path(__file__).parent / "results" / "evolution.json"
POPULATION, GENERATIONS, WITHIN = 50, 20, 0.03


def ours(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Success of each image, (N,) bool."""
    return OnePixel(population=POPULATION, generations=GENERATIONS)(net, x, y, threat=Pixels(1), seed=seed).success


def scipys(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """The same from scipy.optimize.differential_evolution, one image after the other."""
    return torch.tensor([_of_scipy(net, x[i], int(y[i]), seed * len(x) + i) for i in range(len(x))])


def _of_scipy(net: nn.Module, x: Tensor, y: int, seed: int) -> bool:
    """Whether one of the candidates that scipy asks about is misclassified."""
    channels, height, width = x.shape
    found = False

    def confidence(points: np.ndarray) -> np.ndarray:
        nonlocal found
        candidates = x.repeat(points.shape[1], 1, 1, 1)
        rows, columns = points[:2].astype(int).clip(max=[[height - 1], [width - 1]])
        candidates[np.arange(len(candidates)), :, rows, columns] = torch.tensor(points[2:].T, dtype=x.dtype)
        with torch.no_grad():
            logits = net(candidates)
        found |= bool((logits.argmax(1) != y).any())
        of_label: np.ndarray = logits.softmax(1)[:, y].double().numpy()
        return of_label

    space = [(0, height), (0, width)] + [(0, 1)] * channels
    differential_evolution(
        confidence,
        space,
        strategy="best1bin",
        mutation=(0.5, 1),
        recombination=1,
        popsize=POPULATION // len(space),
        maxiter=GENERATIONS,
        init="latinhypercube",
        tol=0,
        atol=-1,
        polish=False,
        updating="deferred",
        vectorized=True,
        callback=lambda *_, **__: found,
        rng=seed,
    )
    return found


def compared(of_scipy: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """What (rounds, N) successes say of the difference ours - scipy's; an image counts once, as the mean of its rounds."""
    each = own.mean(0) - of_scipy.mean(0)
    half = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
    low, high = each.mean() - half, each.mean() + half
    return {
        "success": {"scipy": round(float(of_scipy.mean()), 4), "robustkit": round(float(own.mean()), 4)},
        "difference": round(float(each.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "within": WITHIN,
        "equivalent": bool(low > -WITHIN and high < WITHIN),
        "rounds": [_round(a, b) for a, b in zip(of_scipy, own, strict=True)],
    }


def _round(of_scipy: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """One round by itself, with Tango's interval."""
    only_scipy, only_own = int((of_scipy & ~own).sum()), int((own & ~of_scipy).sum())
    low, high = tango(only_scipy, only_own, len(own))
    return {"only_scipy": only_scipy, "only_robustkit": only_own, "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    """Run both on the same images and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same for images that the net has not seen")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = colour_net(options.train)
    x, y = images(options.data)
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero().squeeze(1)[: options.images]
    seeds = range(options.rounds)
    of_scipy = torch.stack([scipys(net, x[right], y[right], seed) for seed in seeds]).numpy()
    own = torch.stack([ours(net, x[right], y[right], seed) for seed in seeds]).numpy()
    result = {
        "command": f"python -m benchmarks.evolution --train FILE.npz --data FILE.npz --images {len(right)} "
        f"--rounds {options.rounds}",
        "machine": {
            "processor": processor(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "scipy": scipy.__version__,
        },
        "setting": {
            "net": "lenet",
            "accuracy": round(accuracy(net, x, y), 4),
            "images": len(right),
            "pixels": 1,
            "population": POPULATION,
            "generations": GENERATIONS,
        },
        **compared(of_scipy, own),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
