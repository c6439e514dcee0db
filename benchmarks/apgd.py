"""Is our APGD its authors'? The same images, models and budgets: the paired difference of the success rates.

    OMP_NUM_THREADS=1 python -m benchmarks.apgd [--images 500] [--rounds 3]        (pip install pyautoattack)

Both attack the first held-out images that the model gets right (the digits have 349 of them), with 100 steps from random
starts; each round has a seed of its own. An image counts once, as the mean of its rounds, so that what is left of the luck of
the starts is part of the interval. Equivalent are the two where the whole 90 % interval of the difference lies within 2 points
(two one-sided tests at 5 %). "not_weaker" is the lower of the two tests alone: it lets ours be stronger. Each row answers for
itself; that all of them hold needs no correction for their number, since each has to.

The result goes to benchmarks/results/apgd.json after each row, so that a run which ends early leaves what it has.
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
WITHIN, LEVEL, STEPS, TARGETS = 0.02, 1.645, 100, 3
MODELS: tuple[tuple[str, tuple[Threat, ...]], ...] = (
    ("digits-mlp", (Linf(0.1), L2(0.5), L1(1.5))),
    ("mnist-cnn", (Linf(0.1), L2(1.1), L1(6.0))),
    ("mnist-cnn-robust", (Linf(0.3), L2(2.0), L1(10.0))),
)
LOSSES = {"cross-entropy": "ce", "dlr": "dlr", "targeted-dlr": "dlr-targeted"}


def ours(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str, seed: int) -> Tensor:
    """Success of each image, (N,) bool."""
    kind: Any = L1APGD if isinstance(threat, L1) else APGD  # Any: the word for the loss comes from a table
    success: Tensor = kind(steps=STEPS, loss=loss, targets=TARGETS)(net, x, y, threat=threat, seed=seed).success
    return success


def theirs(net: nn.Module, x: Tensor, y: Tensor, threat: Threat, loss: str, seed: int) -> Tensor:
    """The same by the authors' code, as packaged in pyautoattack."""
    try:
        library: Any = importlib.import_module("pyautoattack.autopgd_base")
    except ImportError as error:
        raise SystemExit("pyautoattack is missing, with which ours is compared: pip install pyautoattack") from error
    setting: dict[str, Any] = {"n_iter": STEPS, "norm": type(threat).__name__, "eps": threat.eps, "seed": seed, "device": "cpu"}
    if loss == "targeted-dlr":
        attack = library.APGDAttack_targeted(net, n_target_classes=TARGETS, **setting)
    else:
        attack = library.APGDAttack(net, loss=LOSSES[loss], **setting)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of zero gradients
        x_adv = attack.perturb(x.clone(), y.clone())
    with torch.no_grad():
        success: Tensor = net(x_adv).argmax(1) != y
    return success


def compared(of_theirs: np.ndarray, own: np.ndarray) -> dict[str, Any]:
    """What (rounds, N) successes say of the difference ours - theirs; an image counts once, as the mean of its rounds."""
    each = own.mean(0) - of_theirs.mean(0)
    # One image of disagreement is put in, without which full agreement would claim to know everything.
    half = LEVEL * max(each.std(ddof=1), 1 / math.sqrt(len(each))) / math.sqrt(len(each))
    low, high = each.mean() - half, each.mean() + half
    return {
        "images": len(each),
        "rounds": len(own),
        "success": {"authors": round(float(of_theirs.mean()), 4), "robustkit": round(float(own.mean()), 4)},
        "difference": round(float(each.mean()), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "equivalent": bool(low > -WITHIN and high < WITHIN),
        "not_weaker": bool(low > -WITHIN),
        "only_authors": [_where(a & ~b) for a, b in zip(of_theirs, own, strict=True)],
        "only_robustkit": [_where(b & ~a) for a, b in zip(of_theirs, own, strict=True)],
    }


def _where(images: np.ndarray) -> str:
    """The numbers of the images, in one line of the file."""
    return " ".join(map(str, np.flatnonzero(images)))


def measured(name: str, threat: Threat, loss: str, images: int, rounds: int) -> dict[str, Any]:
    """One model, threat and loss. Images are numbered as in the part of the data that the model gets right."""
    net, whole = zoo.load(name), data.load(str(zoo.card(name).recipe["data"])).part()
    with torch.no_grad():
        right = (net(whole.x).argmax(1) == whole.y).nonzero().squeeze(1)[:images]
    x, y, seeds = whole.x[right], whole.y[right], range(rounds)
    of_theirs = torch.stack([theirs(net, x, y, threat, loss, seed) for seed in seeds]).numpy()
    own = torch.stack([ours(net, x, y, threat, loss, seed) for seed in seeds]).numpy()
    row = {"model": name, "threat": repr(threat), "loss": loss, **compared(of_theirs, own)}
    print(row["model"], row["threat"], loss, row["success"], row["low"], row["high"], row["equivalent"], flush=True)
    return row


def told_of(rows: Sequence[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """All that the file says of the rows so far."""
    return {
        "command": f"python -m benchmarks.apgd --images {options.images} --rounds {options.rounds}",
        "machine": {
            "processor": processor(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyautoattack": version("pyautoattack"),
        },
        "setting": {"steps": STEPS, "targets": TARGETS, "interval": "90 %", "within": WITHIN},
        "equivalent": sum(row["equivalent"] for row in rows),
        "not_weaker": sum(row["not_weaker"] for row in rows),
        "of": len(rows),
        "seconds": round(seconds),
        "rows": rows,
    }


def main() -> None:
    """Run both on all models, and write the file after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULT.parent.mkdir(exist_ok=True)
    begun, rows = time.monotonic(), []
    for (name, threats), loss in itertools.product(MODELS, LOSSES):
        for threat in threats:
            rows.append(measured(name, threat, loss, options.images, options.rounds))
            told = told_of(rows, options, time.monotonic() - begun)
            RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
