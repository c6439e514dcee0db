"""Compare `Standard` with AutoAttack, image by image: which images each breaks, and the cost.

    OMP_NUM_THREADS=1 python -m benchmarks.standard [--train FILE.npz --data FILE.npz] [--images 200] [--rounds 3]

AutoAttack is that of the package pyautoattack, version "standard". Forwards and gradients are counted by the model, in the same
way for both; the cost is in forward-equivalents, where a gradient counts as two more forwards. Seconds are processor seconds,
which do not depend on other processes. AutoAttack's results are cached in the folder for temporary files, by a hash of weights
and images, because AutoAttack takes most of the time and does not depend on robustkit; the file records when they were
measured.

With `--stages` the script measures the contribution of each stage instead: the cascade without its audit, complete and with one
stage left out. The result is written to benchmarks/results/standard_stages.json.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.classifiers import CLASSIFIERS, Classifier, trained_classifier
from benchmarks.machine import processor
from robustkit import L2, PGD, Target
from robustkit.attack import Attack
from robustkit.attacks import Standard
from robustkit.attacks.standard.standard import STAGES

BATCH_SIZE = 1000
RESULT, STAGES_RESULT = (Path(__file__).parent / "results" / name for name in ("standard.json", "standard_stages.json"))


class Counting(nn.Module):
    """A model that counts the images of its forward and backward passes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """The output of the model."""
        self.forwards += len(x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        out: Tensor = self.net(x)
        return out

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def autoattack(net: nn.Module, x: Tensor, y: Tensor, one: Classifier, seed: int) -> dict[str, Any]:
    """Run AutoAttack, or read the cached result: the robust images and the cost."""
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (*net.state_dict().values(), x, y)))
    digest.update(repr((one.threat, seed)).encode())
    file = Path(tempfile.gettempdir()) / "robustkit-autoattack" / f"{digest.hexdigest()[:16]}.json"
    if file.exists():
        cached: dict[str, Any] = json.loads(file.read_text())
        return cached
    from pyautoattack import AutoAttack

    def run(model: nn.Module) -> Tensor:
        norm = "L2" if isinstance(one.threat, L2) else "Linf"
        attack = AutoAttack(model, norm=norm, eps=float(one.threat.eps), seed=seed, version="standard", device="cpu")
        attack.verbose = False
        x_adv: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv

    row = measure(net, run, y)
    row["at"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row))
    return row


def ours(net: nn.Module, x: Tensor, y: Tensor, one: Classifier, seed: int, attack: Attack) -> dict[str, Any]:
    """Run our attack: the robust images and the cost, with its stages, flags and notes."""
    results = []

    def run(model: nn.Module) -> Tensor:
        # All images are one batch, as for AutoAttack; parallel descents fill the rest of it.
        results.append(attack(Target(model, batch_size=BATCH_SIZE), x, y, threat=one.threat, seed=seed))
        x_adv: Tensor = results[0].x_adv
        return x_adv

    row = measure(net, run, y)
    (result,) = results
    inside = one.threat.contains(result.x_adv, x)
    assert bool(inside.all()), "a point is outside the threat"
    stages = {stage.name: [stage.solved, stage.forwards, stage.backwards] for stage in result.stages}
    flags = [f"{flag.name}: {flag.why}" for flag in result.flags]
    return {**row, "stages": stages, "flags": flags, "notes": [note.name for note in result.notes]}


def measure(net: nn.Module, run: Callable[[nn.Module], Tensor], y: Tensor) -> dict[str, Any]:
    """Run an attack and measure it: indices of the robust images, forwards, backwards, cost and seconds."""
    model = Counting(net).eval()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv = run(model)
    seconds = time.process_time() - start
    with torch.no_grad():
        robust = (net(x_adv).argmax(1) == y).nonzero().squeeze(1).tolist()
    cost = model.forwards + 2 * model.backwards
    return {"robust": robust, "forwards": model.forwards, "backwards": model.backwards, "cost": cost, "seconds": seconds}


def compare(one: Classifier, files: tuple[str | None, str | None], images: int, rounds: int) -> dict[str, Any]:
    """Compare on one model: the results of both in each round, the differing images, and the ratios of cost and time."""
    net, x, y = trained_classifier(one, *files, images)
    rows = []
    for seed in range(rounds):
        theirs, mine = autoattack(net, x, y, one, seed), ours(net, x, y, one, seed, Standard())
        rows.append(
            {
                "seed": seed,
                "autoattack": theirs,
                "standard": mine,
                "only_autoattack_breaks": sorted(set(mine["robust"]) - set(theirs["robust"])),
                "only_standard_breaks": sorted(set(theirs["robust"]) - set(mine["robust"])),
                "cost_factor": theirs["cost"] / mine["cost"],
                "time_factor": theirs["seconds"] / mine["seconds"],
            }
        )
        _print_row(one.name, rows[-1], len(x))
    pgd = ours(net, x, y, one, 0, PGD())
    return {
        "model": one.name,
        "threat": repr(one.threat),
        "hardened": one.hardened,
        "images": len(x),
        "rounds": rows,
        "pgd40": {"robust": len(pgd["robust"]), "cost": pgd["cost"], "seconds": pgd["seconds"]},
    }


def _print_row(name: str, row: dict[str, Any], n: int) -> None:
    mine, theirs = row["standard"], row["autoattack"]
    print(
        f"{name:<17} seed {row['seed']}: robust {len(mine['robust']) / n:.1%} (AutoAttack {len(theirs['robust']) / n:.1%}), "
        f"only AutoAttack breaks {row['only_autoattack_breaks']}, only Standard {row['only_standard_breaks']}; "
        f"cost / {row['cost_factor']:.1f}, time / {row['time_factor']:.1f}; flags {mine['flags']}",
        flush=True,
    )


def ablate_stages(
    names: Sequence[Classifier], files: tuple[str | None, str | None], images: int, rounds: int
) -> list[dict[str, Any]]:
    """Run the cascade without its audit, complete and without each stage; return the robust images and the cost."""
    rows = []
    for skip in ("", *STAGES):
        row: dict[str, Any] = {"without": skip or "nothing", "models": {}}
        for one in names:
            net, x, y = trained_classifier(one, *files, images)
            results = [ours(net, x, y, one, seed, Standard(skip=skip, audit=False)) for seed in range(rounds)]
            row["models"][one.name] = {
                "robust": [len(result["robust"]) for result in results],
                "cost": sum(result["cost"] for result in results) // rounds,
            }
        row["robust"] = sum(sum(model["robust"]) for model in row["models"].values()) / rounds
        row["cost"] = sum(model["cost"] for model in row["models"].values())
        print(f"without {row['without']}: {row['robust']} robust, {row['cost']} forward-equivalents", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Run, print and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--train", help="npz file with x (N, 32, 32, 3) bytes and y; without it, the models for colour images are skipped"
    )
    parser.add_argument("--data", help="the same format, with held-out images")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--stages", action="store_true", help="measure the contribution of each stage")
    parser.add_argument("--peer-only", action="store_true", help="run only AutoAttack, and cache its results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = (options.train, options.data)
    names = [
        one for one in CLASSIFIERS if (one.data != "colours" or options.train) and one.name in (options.only or [one.name])
    ]
    if options.peer_only:
        for seed in range(options.rounds):
            for one in names:
                net, x, y = trained_classifier(one, *files, options.images)
                row = autoattack(net, x, y, one, seed)
                print(one.name, seed, len(row["robust"]), round(row["seconds"]), flush=True)
        return
    content: dict[str, Any] = {
        "command": f"python -m benchmarks.standard --images {options.images} --rounds {options.rounds}"
        + (" --stages" if options.stages else "")
        + (" --train ... --data ..." if options.train else ""),
        "machine": {
            "processor": processor(),
            "threads": 1,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyautoattack": importlib.metadata.version("pyautoattack"),
        },
        "images_at_once": BATCH_SIZE,
    }
    if options.stages:
        _write(STAGES_RESULT, {**content, "without": ablate_stages(names, files, options.images, options.rounds)}, options)
        return
    content["models"] = []
    for one in names:  # written after each model, so that an interrupted run keeps its results
        content["models"].append(compare(one, files, options.images, options.rounds))
        _write(RESULT, content, options)


def _write(file: Path, content: dict[str, Any], options: argparse.Namespace) -> None:
    """Write the file as JSON, unless only some of the models were measured."""
    if not options.only:
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
