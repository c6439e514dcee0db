"""Is our APGD equivalent to its authors' code? The paired difference of the success rates on the same images and models.

    OMP_NUM_THREADS=1 python -m benchmarks.apgd [--images 500] [--rounds 3]        (pip install pyautoattack)

Both attack the first held-out images that the model classifies correctly (349 for the digits), with 100 steps from random
starts; each round has its own seed. An image counts once, as the mean over its rounds, so that the interval includes the
variance of the random starts. The two are equivalent if the 90 % interval of the difference lies within 2 percentage points
(two one-sided tests at 5 %). "not_weaker" is only the lower test: it allows ours to be stronger. The statement that all rows
hold needs no correction for multiple tests, since each row must hold.

The result is written to benchmarks/results/apgd.json after each row, so that an interrupted run keeps its rows.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import platform
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import processor
from robustkit import L1, L2, Linf, data, zoo
from robustkit.attacks import APGD, L1APGD
from robustkit.threats import Threat

RESULT = Path(__file__).parent / "results" / "apgd.json"
EQUIVALENCE_MARGIN, QUANTILE, STEPS, TARGETS = 0.02, 1.645, 100, 3
MODELS: tuple[tuple[str, tuple[Threat, ...]], ...] = (
    ("digits-mlp", (Linf(0.1), L2(0.5), L1(1.5))),
    ("mnist-cnn", (Linf(0.1), L2(1.1), L1(6.0))),
    ("mnist-cnn-robust", (Linf(0.3), L2(2.0), L1(10.0))),
)
LOSSES = {"cross-entropy": "ce", "dlr": "dlr", "targeted-dlr": "dlr-targeted"}


def ours(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str, seed: int) -> Tensor:
    """Run our attack; return the success of each image, (N,) bool."""
    kind: Any = L1APGD if isinstance(threat, L1) else APGD  # Any: the name of the loss comes from a table
    success: Tensor = kind(steps=STEPS, loss=loss, targets=TARGETS)(net, x, y, threat=threat, seed=seed).success
    return success


def theirs(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str, seed: int) -> Tensor:
    """Run the authors' code, as packaged in pyautoattack; return the success of each image, (N,) bool."""
    try:
        library: Any = importlib.import_module("pyautoattack.autopgd_base")
    except ImportError as error:
        raise SystemExit("pyautoattack is not installed: pip install pyautoattack") from error
    setting: dict[str, Any] = {"n_iter": STEPS, "norm": type(threat).__name__, "eps": threat.eps, "seed": seed, "device": "cpu"}
    if loss == "targeted-dlr":
        attack = library.APGDAttack_targeted(net, n_target_classes=TARGETS, **setting)
    else:
        attack = library.APGDAttack(net, loss=LOSSES[loss], **setting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about zero gradients
        x_adv = attack.perturb(x.clone(), y.clone())
    with torch.no_grad():
        success: Tensor = net(x_adv).argmax(1) != y
    return success


def compare(their_success: np.ndarray, our_success: np.ndarray) -> dict[str, Any]:
    """Compute the difference ours - theirs from successes (rounds, N); an image counts once, as the mean of its rounds."""
    each = our_success.mean(0) - their_success.mean(0)
    # The standard deviation is at least that of one differing image; full agreement would give an empty interval.
    half = QUANTILE * max(each.std(ddof=1), 1 / math.sqrt(len(each))) / math.sqrt(len(each))
    low, high = each.mean() - half, each.mean() + half
    return {
        "images": len(each),
        "rounds": len(our_success),
        "success": {"authors": round(float(their_success.mean()), 4), "robustkit": round(float(our_success.mean()), 4)},
        "difference": round(float(each.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "equivalent": bool(low > -EQUIVALENCE_MARGIN and high < EQUIVALENCE_MARGIN),
        "not_weaker": bool(low > -EQUIVALENCE_MARGIN),
        "only_authors": [_format_indices(a & ~b) for a, b in zip(their_success, our_success, strict=True)],
        "only_robustkit": [_format_indices(b & ~a) for a, b in zip(their_success, our_success, strict=True)],
    }


def _format_indices(images: np.ndarray) -> str:
    """Format the indices of the images on one line."""
    return " ".join(map(str, np.flatnonzero(images)))


def measure(name: str, threat: Threat, loss: str, images: int, rounds: int) -> dict[str, Any]:
    """Compare on one model, threat and loss. Image indices count the correctly classified images."""
    net, whole = zoo.load(name), data.load(str(zoo.card(name).recipe["data"])).part()
    with torch.no_grad():
        correct = (net(whole.x).argmax(1) == whole.y).nonzero().squeeze(1)[:images]
    x, y, seeds = whole.x[correct], whole.y[correct], range(rounds)
    their_success = torch.stack([theirs(net, x, y, threat, loss, seed) for seed in seeds]).numpy()
    our_success = torch.stack([ours(net, x, y, threat, loss, seed) for seed in seeds]).numpy()
    row = {"model": name, "threat": repr(threat), "loss": loss, **compare(their_success, our_success)}
    print(row["model"], row["threat"], loss, row["success"], row["low"], row["high"], row["equivalent"], flush=True)
    return row


def report(rows: Sequence[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Return the content of the result file for the rows so far."""
    return {
        "command": f"python -m benchmarks.apgd --images {options.images} --rounds {options.rounds}",
        "machine": {
            "processor": processor(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyautoattack": version("pyautoattack"),
        },
        "setting": {"steps": STEPS, "targets": TARGETS, "interval": "90 %", "within": EQUIVALENCE_MARGIN},
        "equivalent": sum(row["equivalent"] for row in rows),
        "not_weaker": sum(row["not_weaker"] for row in rows),
        "of": len(rows),
        "seconds": round(seconds),
        "rows": rows,
    }


def main() -> None:
    """Compare on all models; write the file after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULT.parent.mkdir(exist_ok=True)
    start, rows = time.monotonic(), []
    for (name, threats), loss in itertools.product(MODELS, LOSSES):
        for threat in threats:
            rows.append(measure(name, threat, loss, options.images, options.rounds))
            content = report(rows, options, time.monotonic() - start)
            RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
