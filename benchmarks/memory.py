"""Does an attack on ten times as many images need more memory? Its peak memory, minus that of holding inputs and results.

    make memory            or            OMP_NUM_THREADS=1 python -m benchmarks.memory

Each attack runs on 28 x 28 images and a small net, with fast settings; a second process only holds inputs and results. The
result is written to benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.machine import peak_memory, processor
from robustkit import Linf, Pixels, Result, zoo
from robustkit.attack import Attack
from robustkit.attacks import (
    DeepFool,
    OnePixel,
    PixelSearch,
    SparseRS,
    UniversalDeepFool,
    UniversalPGD,
    UniversalSingular,
)

RESULT = Path(__file__).parent / "results" / "memory.json"
FEW, MANY = 500, 5_000
ATTACKS: tuple[Attack, ...] = (
    DeepFool(steps=3),
    UniversalPGD(epochs=1, starts=1),
    UniversalDeepFool(passes=1),
    UniversalSingular(layer="0", iterations=5),
    OnePixel(population=16, generations=1),
    PixelSearch(queries=16),
    SparseRS(queries=16),
)


def extra_memory(number: int, n: int) -> float:
    """Return the peak memory in MiB of an attack on n images, minus that of inputs and results."""
    command = [sys.executable, "-m", "benchmarks.memory", str(number), str(n)]
    baseline, attacked = (
        float(subprocess.run([*command, do], capture_output=True, text=True, check=True).stdout) for do in ("hold", "run")
    )
    return round(attacked - baseline, 1)


def child_process(number: int, n: int, do: str) -> None:
    """Run in the new processes of `extra_memory`."""
    torch.manual_seed(0)
    net, x, attack = zoo.load("mnist-cnn"), torch.rand(n, 1, 28, 28), ATTACKS[number]
    with torch.no_grad():
        y = torch.cat([net(part).argmax(1) for part in x.split(128)])  # type: ignore[no-untyped-call]
    threat = Pixels(1) if Pixels in attack.serves else Linf(0.02)
    attack(net, x[:128], y[:128], threat=threat)  # allocates memory that does not depend on n
    result = attack(net, x, y, threat=threat) if do == "run" else Result.allocate(x)
    result.x_adv.add_(0)  # writes to it, so that its memory is allocated in both processes
    print(peak_memory())


def main() -> None:
    """Measure, print and write the file."""
    torch.set_num_threads(1)
    if len(sys.argv) == 4:
        child_process(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
        return
    rows = {
        repr(attack): {f"{n} images": extra_memory(number, n) for n in (FEW, MANY)} for number, attack in enumerate(ATTACKS)
    }
    content = {
        "what": "peak MiB beyond inputs and outputs",
        "machine": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attacks": rows,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
