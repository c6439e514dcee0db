"""Is our differential evolution equivalent to scipy's? The paired difference of the success rates with one pixel.

    OMP_NUM_THREADS=1 python -m benchmarks.evolution --train FILE.npz --data FILE.npz [--images 500] [--rounds 3]

Both use the same images, net and budget, and in each round a separate seed for each image. In both, every evaluated candidate
counts as a possible success. The two are equivalent if the 95 % interval of the difference lies within 3 percentage points.
The result is written to benchmarks/results/evolution.json.
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
POPULATION, GENERATIONS, EQUIVALENCE_MARGIN = 50, 20, 0.03


def ours(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Run OnePixel; return the success of each image, (N,) bool."""
    return OnePixel(population=POPULATION, generations=GENERATIONS)(net, x, y, threat=Pixels(1), seed=seed).success


def scipy_attack(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Run scipy.optimize.differential_evolution on each image; return the success of each, (N,) bool."""
    return torch.tensor([_attack_one(net, x[i], int(y[i]), seed * len(x) + i) for i in range(len(x))])


def _attack_one(net: nn.Module, x: Tensor, y: int, seed: int) -> bool:
    """Return whether any candidate that scipy evaluates is misclassified."""
    channels, height, width = x.shape
    success = False

    def confidence(points: np.ndarray) -> np.ndarray:
        nonlocal success
        candidates = x.repeat(points.shape[1], 1, 1, 1)
        rows, columns = points[:2].astype(int).clip(max=[[height - 1], [width - 1]])
        candidates[np.arange(len(candidates)), :, rows, columns] = torch.tensor(points[2:].T, dtype=x.dtype)
        with torch.no_grad():
            logits = net(candidates)
        success |= bool((logits.argmax(1) != y).any())
        label_confidence: np.ndarray = logits.softmax(1)[:, y].double().numpy()
        return label_confidence

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
        callback=lambda *_, **__: success,
        rng=seed,
    )
    return success


def compare(scipy_success: np.ndarray, our_success: np.ndarray) -> dict[str, Any]:
    """Compute the difference ours - scipy's from successes (rounds, N); an image counts once, as the mean of its rounds."""
    each = our_success.mean(0) - scipy_success.mean(0)
    half = 1.96 * each.std(ddof=1) / math.sqrt(len(each))
    low, high = each.mean() - half, each.mean() + half
    return {
        "success": {"scipy": round(float(scipy_success.mean()), 4), "robustkit": round(float(our_success.mean()), 4)},
        "difference": round(float(each.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "within": EQUIVALENCE_MARGIN,
        "equivalent": bool(low > -EQUIVALENCE_MARGIN and high < EQUIVALENCE_MARGIN),
        "rounds": [_compare_round(a, b) for a, b in zip(scipy_success, our_success, strict=True)],
    }


def _compare_round(scipy_success: np.ndarray, our_success: np.ndarray) -> dict[str, Any]:
    """Compare one round, with Tango's interval."""
    only_scipy, only_ours = int((scipy_success & ~our_success).sum()), int((our_success & ~scipy_success).sum())
    low, high = tango(only_scipy, only_ours, len(our_success))
    return {"only_scipy": only_scipy, "only_robustkit": only_ours, "low": round(low, 4), "high": round(high, 4)}


def main() -> None:
    """Run both on the same images and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same format, with held-out images")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = colour_net(options.train)
    x, y = images(options.data)
    with torch.no_grad():
        correct = (net(x).argmax(1) == y).nonzero().squeeze(1)[: options.images]
    seeds = range(options.rounds)
    scipy_success = torch.stack([scipy_attack(net, x[correct], y[correct], seed) for seed in seeds]).numpy()
    our_success = torch.stack([ours(net, x[correct], y[correct], seed) for seed in seeds]).numpy()
    result = {
        "command": f"python -m benchmarks.evolution --train FILE.npz --data FILE.npz --images {len(correct)} "
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
            "images": len(correct),
            "pixels": 1,
            "population": POPULATION,
            "generations": GENERATIONS,
        },
        **compare(scipy_success, our_success),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
