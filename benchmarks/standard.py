"""`Standard` beside AutoAttack, image by image: who breaks what, at what cost.

    OMP_NUM_THREADS=1 python -m benchmarks.standard [--train FILE.npz --data FILE.npz] [--images 200] [--rounds 3]

AutoAttack is that of the package pyautoattack, version "standard". Forwards and gradients are counted by the model itself,
alike for both; a forward-equivalent is a forward, and a gradient two more. Seconds are those of the processor, so that other
work on the machine counts for nobody. What AutoAttack found on a model is kept in a folder for temporary files, by a hash of
the weights and images, since it takes most of the time and does not depend on robustkit; the file says when it was measured.

With `--stages` what each stage buys is measured instead: the cascade without its audit, whole and with one stage left out. That
goes to benchmarks/results/standard_stages.json.
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

from benchmarks.classifiers import CLASSIFIERS, Classifier, made
from benchmarks.machine import processor
from robustkit import L2, PGD, Target
from robustkit.attack import Attack
from robustkit.attacks import Standard
from robustkit.attacks.standard.standard import STAGES

AT_ONCE = 1000  # images through the model
RESULT, STAGES_RESULT = (Path(__file__).parent / "results" / name for name in ("standard.json", "standard_stages.json"))


class Counting(nn.Module):
    """A model that counts what goes through it, there and back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.forwards, self.backwards = net, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        """The answer of the model."""
        self.forwards += len(x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(self._count)  # type: ignore[no-untyped-call]
        out: Tensor = self.net(x)
        return out

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def autoattack(net: nn.Module, x: Tensor, y: Tensor, one: Classifier, seed: int) -> dict[str, Any]:
    """Which images survive it, and the cost; from the folder where it was run before."""
    held = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in (*net.state_dict().values(), x, y)))
    held.update(repr((one.threat, seed)).encode())
    file = Path(tempfile.gettempdir()) / "robustkit-autoattack" / f"{held.hexdigest()[:16]}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    from pyautoattack import AutoAttack

    def attacked(model: nn.Module) -> Tensor:
        norm = "L2" if isinstance(one.threat, L2) else "Linf"
        judge = AutoAttack(model, norm=norm, eps=float(one.threat.eps), seed=seed, version="standard", device="cpu")
        judge.verbose = False
        x_adv: Tensor = judge.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return x_adv

    found = measured(net, attacked, y)
    found["at"] = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def ours(net: nn.Module, x: Tensor, y: Tensor, one: Classifier, seed: int, attack: Attack) -> dict[str, Any]:
    """The same of an attack of ours, with its stages and flags."""
    results = []

    def attacked(model: nn.Module) -> Tensor:
        # All images are one batch, as for AutoAttack; descents side by side fill the rest of it.
        results.append(attack(Target(model, batch_size=AT_ONCE), x, y, threat=one.threat, seed=seed))
        x_adv: Tensor = results[0].x_adv
        return x_adv

    found = measured(net, attacked, y)
    (result,) = results
    inside = one.threat.contains(result.x_adv, x)
    assert bool(inside.all()), "a point outside of the threat"
    stages = {stage.name: [stage.solved, stage.forwards, stage.backwards] for stage in result.stages}
    flags = [f"{flag.name}: {flag.why}" for flag in result.flags]
    return {**found, "stages": stages, "flags": flags, "notes": [note.name for note in result.notes]}


def measured(net: nn.Module, attacked: Callable[[nn.Module], Tensor], y: Tensor) -> dict[str, Any]:
    """Run it on one thread; the robust images by their numbers."""
    model = Counting(net).eval()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv = attacked(model)
    seconds = time.process_time() - start
    with torch.no_grad():
        robust = (net(x_adv).argmax(1) == y).nonzero().squeeze(1).tolist()
    cost = model.forwards + 2 * model.backwards
    return {"robust": robust, "forwards": model.forwards, "backwards": model.backwards, "cost": cost, "seconds": seconds}


def compared(one: Classifier, files: tuple[str | None, str | None], images: int, rounds: int) -> dict[str, Any]:
    """One model: every round of both, who breaks what, and the factors."""
    net, x, y = made(one, *files, images)
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
        _say(one.name, rows[-1], len(x))
    pgd = ours(net, x, y, one, 0, PGD())
    return {
        "model": one.name,
        "threat": repr(one.threat),
        "hardened": one.hardened,
        "images": len(x),
        "rounds": rows,
        "pgd40": {"robust": len(pgd["robust"]), "cost": pgd["cost"], "seconds": pgd["seconds"]},
    }


def _say(name: str, row: dict[str, Any], n: int) -> None:
    mine, theirs = row["standard"], row["autoattack"]
    print(
        f"{name:<17} seed {row['seed']}: robust {len(mine['robust']) / n:.1%} (AutoAttack {len(theirs['robust']) / n:.1%}), "
        f"only AutoAttack breaks {row['only_autoattack_breaks']}, only Standard {row['only_standard_breaks']}; "
        f"cost / {row['cost_factor']:.1f}, time / {row['time_factor']:.1f}; flags {mine['flags']}",
        flush=True,
    )


def ablated(
    names: Sequence[Classifier], files: tuple[str | None, str | None], images: int, rounds: int
) -> list[dict[str, Any]]:
    """The cascade without its audit, whole and with each stage left out: what is robust and what it costs, over all rounds."""
    rows = []
    for skip in ("", *STAGES):
        row: dict[str, Any] = {"without": skip or "nothing", "models": {}}
        for one in names:
            net, x, y = made(one, *files, images)
            found = [ours(net, x, y, one, seed, Standard(skip=skip, audit=False)) for seed in range(rounds)]
            row["models"][one.name] = {
                "robust": [len(each["robust"]) for each in found],
                "cost": sum(each["cost"] for each in found) // rounds,
            }
        row["robust"] = sum(sum(model["robust"]) for model in row["models"].values()) / rounds
        row["cost"] = sum(model["cost"] for model in row["models"].values())
        print(f"without {row['without']}: {row['robust']} robust, {row['cost']} forward-equivalents", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", help="npz file with x (N, 32, 32, 3) bytes and y; without it there are no colours")
    parser.add_argument("--data", help="the same for images that the nets have not seen")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--stages", action="store_true", help="measure what each stage buys")
    parser.add_argument("--peer-only", action="store_true", help="run AutoAttack alone, and keep what it finds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = (options.train, options.data)
    names = [
        one for one in CLASSIFIERS if (one.data != "colours" or options.train) and one.name in (options.only or [one.name])
    ]
    if options.peer_only:
        for seed in range(options.rounds):
            for one in names:
                net, x, y = made(one, *files, options.images)
                found = autoattack(net, x, y, one, seed)
                print(one.name, seed, len(found["robust"]), round(found["seconds"]), flush=True)
        return
    told: dict[str, Any] = {
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
        "images_at_once": AT_ONCE,
    }
    if options.stages:
        _write(STAGES_RESULT, {**told, "without": ablated(names, files, options.images, options.rounds)}, options)
        return
    told["models"] = []
    for one in names:  # written after each, so that a run which ends early leaves what it has
        told["models"].append(compared(one, files, options.images, options.rounds))
        _write(RESULT, told, options)


def _write(file: Path, told: dict[str, Any], options: argparse.Namespace) -> None:
    """As JSON; not where only some of the models were measured."""
    if not options.only:
        file.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
