"""Digests of what every attack returns, bit for bit, and of what the default plan of the bench reports.

A change that is meant to leave all numbers as they are is checked by

    python tests/digests.py            compare with tests/digests.json; exit 1 and a line for each case that differs
    python tests/digests.py --plan     the same, and the records of the default plan (a minute more)
    python tests/digests.py --write    write tests/digests.json, with --plan for both

Bits are those of one kind of processor and one version of torch, so the file names both. On another machine write the
file at the commit before the change, and compare after it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from robustkit import FGSM, L1, L2, MIFGSM, PGD, ClassifyAs, Linf, Misclassify, Pixels, Target, data, zoo
from robustkit.attacks import (
    APGD,
    FAB,
    FMN,
    L1APGD,
    DeepFool,
    OnePixel,
    PixelSearch,
    RayS,
    SparseRS,
    Square,
    Standard,
    UniversalDeepFool,
    UniversalPGD,
    UniversalSingular,
)
from robustkit.losses import dlr, margin

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.machine import processor

FILE = Path(__file__).with_name("digests.json")
KEEPS = ("first", "best", "smallest", "last")
THREATS = {"linf": Linf(0.1), "l2": L2(1.0), "l1": L1(10.0), "pixels": Pixels(2)}
BALLS, ALL = ("linf", "l2"), tuple(THREATS)
ATTACKS = (
    (FGSM(), ALL),
    (PGD(steps=8), ALL),
    (PGD(steps=8, random_start=False), ALL),
    (PGD(steps=8, step_size=0.02), ALL),
    (MIFGSM(), ALL),
    (APGD(steps=12), BALLS),
    (APGD(steps=12, loss="margin", restarts=2), BALLS),
    (APGD(steps=12, loss="dlr"), BALLS),
    (APGD(steps=12, loss="targeted-dlr", targets=2), BALLS),
    (L1APGD(steps=25), ("l1",)),
    (FMN(steps=12), ALL),
    (FAB(steps=12, parts=2), BALLS),
    (DeepFool(steps=8), BALLS),
    (Square(queries=40), BALLS),
    (RayS(queries=40), BALLS),
    (OnePixel(population=20, generations=4), ("pixels",)),
    (OnePixel(population=20, generations=4, recipe="paper"), ("pixels",)),
    (PixelSearch(queries=60, at_once=8), ("pixels",)),
    (SparseRS(queries=40), ("pixels",)),
    (UniversalPGD(epochs=2, batch=4, starts=2), BALLS),
    (UniversalDeepFool(passes=2, batch=4), BALLS),
    (UniversalSingular(images=4, iterations=4), BALLS),
    (Standard(), BALLS),
)
# Keys of results.json that were renamed since the file was written, old to new.
RENAMED = {"evidence": "checks"}


class Dropout(nn.Module):
    """A classifier whose inputs are dropped at random."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(nn.functional.dropout(x, 0.1, training=True))


def rounded(x):
    return zoo.load("digits-mlp")((x * 7).round() / 7)


def in_training(x):
    """Batch norm that has stayed in training mode: a row depends on its batch."""
    return nn.functional.batch_norm(zoo.load("digits-mlp")(x), None, None, training=True)


def images(spec, count):
    part = data.load(spec).part(limit=count)
    return part.x, part.y


def colour_net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    return nn.Sequential(*layers).eval()


def cases():
    """Each case: its name, and a function without arguments that runs it."""
    x, y = images("mnist-5k", 8)
    net, robust = zoo.load("mnist-cnn"), zoo.load("mnist-cnn-robust")
    for attack, names in ATTACKS:
        for name in names:
            for keep in KEEPS:
                yield (
                    f"{attack!r} {name} {keep}",
                    lambda a=attack, t=THREATS[name], k=keep: a(net, x, y, threat=t, seed=3, keep=k),
                )
    colours = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    rgb = colour_net()
    labels = rgb(colours).argmax(1).detach()
    for attack, names in ATTACKS:
        for name in names:
            threat = {"linf": Linf(2 / 255), "l2": L2(0.1), "l1": L1(2.0), "pixels": Pixels(1)}[name]
            yield f"colours {attack!r} {name}", lambda a=attack, t=threat: a(rgb, colours, labels, threat=t, seed=4)
    wanted = (y + 1) % 10
    for attack in (
        FGSM(),
        PGD(steps=8),
        APGD(steps=12, loss="dlr"),
        FAB(steps=12),
        FMN(steps=12),
        DeepFool(steps=8),
        Standard(),
    ):
        for goal in (ClassifyAs(), ClassifyAs(margin)):
            yield f"targeted {goal!r} {attack!r}", lambda a=attack, g=goal: a(net, x, wanted, goal=g, threat=Linf(0.2), seed=1)
    for goal in (Misclassify(margin), Misclassify(dlr)):
        yield f"{goal!r} PGD", lambda g=goal: PGD(steps=8)(net, x, y, goal=g, threat=Linf(0.1), seed=1)
    dropped = Target(Dropout(net).eval(), stochastic=True, draws=2)
    for attack in (FGSM(), PGD(steps=8), FMN(steps=12), DeepFool(steps=8), Square(queries=40), Standard()):
        for keep in ("first", "smallest", "best"):
            yield f"dropout {attack!r} {keep}", lambda a=attack, k=keep: a(dropped, x, y, threat=Linf(0.1), seed=2, keep=k)
    eps = torch.linspace(0.02, 0.3, 8)
    for attack in (PGD(steps=8), APGD(steps=12), FAB(steps=12), FMN(steps=12), Square(queries=40), Standard()):
        yield f"eps each {attack!r}", lambda a=attack: a(robust, x, y, threat=Linf(eps), seed=2)
        yield f"float64 {attack!r}", lambda a=attack: a(lambda z: robust(z.float()), x.double(), y, threat=L2(1.0), seed=2)
        yield f"no bounds {attack!r}", lambda a=attack: a(robust, x, y, threat=L2(1.0, None), seed=2)
        yield f"batches of 3 {attack!r}", lambda a=attack: a(Target(robust, batch_size=3), x, y, threat=Linf(0.25), seed=2)
        yield f"starts {attack!r}", lambda a=attack: a(net, x, y, threat=Linf(0.1), seed=2, starts=(x + 0.09).clamp(0, 1))
    more, right = images("mnist-5k", 24)
    for skip, was in SKIPS.items():
        yield f"skip {was}", lambda s=skip: Standard(skip=s)(robust, more, right, threat=Linf(0.25), seed=5)
    yield "budget", lambda: Standard(budget=700)(robust, more, right, threat=Linf(0.25), seed=5)
    yield "l2 robust", lambda: Standard()(robust, more, right, threat=L2(2.0), seed=5)
    digits, classes = images("digits", 12)
    mlp = zoo.load("digits-mlp")
    features = Target(robust, features=lambda z: robust[:-1](z))
    yield "features", lambda: Standard()(features, more, right, threat=Linf(0.25), seed=5)
    yield "escalation", lambda: Standard()(rounded, digits, classes, threat=Linf(0.15), seed=5)
    yield "escalation l2", lambda: Standard()(rounded, digits, classes, threat=L2(0.6), seed=5)
    bpda = Target(rounded, mlp, views={"bpda": mlp, "exact": rounded})
    yield "views", lambda: Standard()(bpda, digits, classes, threat=Linf(0.15), seed=5)
    yield "batch-dependent", lambda: Standard()(in_training, digits, classes, threat=Linf(0.15), seed=5)
    yield "perturb", lambda: PGD(steps=8).perturb(net, x, y, threat=Linf(0.1), seed=3)


# Stages that `Standard` may leave out, and what they were called when the file was written.
SKIPS = {
    "": "",
    "parts": "parts",
    "boundary": "border",
    "patches": "windows",
    "refine": "polish",
    "restarts": "restarts",
}


def digest(tensor):
    held = tensor.detach().cpu().contiguous()
    described = f"{held.dtype}{tuple(held.shape)}".encode()
    return hashlib.sha256(described + held.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def facts(result):
    """What must stay: bits of the tensors, and the sums of the costs so that a difference can be read."""
    if isinstance(result, torch.Tensor):
        return {"x_adv": digest(result)}
    names = ("x_adv", "success", "rate", "size", "forwards", "backwards", "flat", "solver")
    sums = [int(getattr(result, name).sum()) for name in ("success", "forwards", "backwards", "flat")]
    stages = [(stage.forwards, stage.backwards, stage.solved) for stage in result.stages]
    checks = [[part for part in vars(check).values() if not isinstance(part, str)] for check in result.checks]
    messages = [len(result.flags), len(result.notes)]
    return {name: digest(getattr(result, name)) for name in names} | {
        "sums": sums,
        "stages": stages,
        "checks": checks,
        "messages": messages,
    }


def records():
    """The records of the default plan without seconds and words: each value by its key."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run(
            [sys.executable, "-m", "robustkit", "bench", "--workers", "2", "--out", str(out)], check=True, capture_output=True
        )
        results = json.loads((out / "results.json").read_text())
    for number, record in enumerate(results["records"]):
        yield f"plan {number}", {key: short(value) for key, value in record.items() if key != "seconds"}
    joint = results["worst_case"]
    for number, record in enumerate(joint):
        yield f"worst case {number}", {key: short(value) for key, value in record.items()}


def short(value):
    """A number or a string as it is; the digest of anything longer, without names and reasons, which may be worded anew."""
    return hashlib.sha256(json.dumps(bare(value)).encode()).hexdigest()[:16] if isinstance(value, dict | list) else value


def bare(value):
    if isinstance(value, dict):
        return [bare(part) for key, part in value.items() if key not in ("name", "why")]
    return [bare(part) for part in value] if isinstance(value, list) else value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="store_true", help="run the default plan of the bench too")
    parser.add_argument("--write", action="store_true", help="write the file instead of comparing with it")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: facts(run()) for name, run in cases() if options.only in name}
    found |= dict(records()) if options.plan else {}
    found = json.loads(json.dumps(found))
    old = json.loads(FILE.read_text()) if FILE.exists() else {"digests": {}}
    made = {"processor": processor(), "torch": torch.__version__}
    if options.write:
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in (old["digests"] | found).items())
        head = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in made.items())
        FILE.write_text(f'{{{head}, "digests": {{\n{lines}\n}}}}\n')
        print(f"{len(found)} digests written")
        return 0
    if {name: old.get(name) for name in made} != made:
        print(
            f"{FILE.name} was written on {old.get('processor')} with torch {old.get('torch')}, this is {made}: bits may differ"
        )
    wrong = 0
    for name, value in found.items():
        before = {RENAMED.get(key, key): part for key, part in old["digests"].get(name, {}).items()}
        differ = [key for key in dict.fromkeys([*before, *value]) if before.get(key) != value.get(key)]
        wrong += bool(differ)
        if differ:
            print(f"{name}: {', '.join(f'{key} was {before.get(key)}, is {value.get(key)}' for key in differ)}")
    print(f"{len(found) - wrong} of {len(found)} digests are equal")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
