"""Does a run over very many images need more memory, and does the time left tell the truth?

    make load            or            OMP_NUM_THREADS=1 python -m benchmarks.load

Digits of scikit-learn (8x8), repeated, as an npz file of bytes; two cases whose costs differ by a factor of several, each
number of images in a process of its own that writes a folder as `robustkit bench` does. The peak of its memory is told, and
how the time left, as it stood when 5 %, 25 %, 50 % and 75 % of the time had passed, compares with the time that it then took.
The result goes to benchmarks/results/load.json.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from benchmarks.machine import peak, processor

RESULT = Path(__file__).parent / "results" / "load.json"
NUMBERS = (2_000, 20_000, 200_000)
MOMENTS = (0.05, 0.25, 0.5, 0.75)


def measured(file: Path, out: Path) -> dict[str, Any]:
    """What a run over the file takes; to be called in a process of its own, whose memory it is."""
    from robustkit.bench.execution.forecast import Forecast
    from robustkit.bench.execution.loaded_run import load
    from robustkit.bench.execution.runner import outcomes
    from robustkit.bench.folder import open_folder
    from robustkit.bench.plan.plan import Case, Plan

    cases = tuple(Case("zoo:digits-mlp", "linf:0.1", attack) for attack in ("fgsm", "pgd:steps=20"))
    begun = time.monotonic()
    loaded = load(Plan(cases, f"npz:{file}"))
    ready, forecast, told = time.monotonic(), Forecast([len(loaded)] * len(cases)), []
    with open_folder(out, loaded.plan) as folder:
        folder.begin(loaded)
        done = []

        def progress(block: Any, found: bool) -> None:
            now = time.monotonic()
            forecast.add(block.task.case, len(block.labels), block.seconds, now)
            told.append((now, forecast.left()))

        for outcome in outcomes(loaded, folder.store, progress=progress):
            done.append(outcome)
            folder.write(loaded, done)
    end = time.monotonic()
    moments = {share: next((end - at, left) for at, left in told if at >= ready + share * (end - ready)) for share in MOMENTS}
    return {
        "images": len(loaded),
        "peak_MiB": round(peak(), 1),
        "seconds": round(end - begun, 1),
        "of_which_loading": round(ready - begun, 1),
        "time_left_told_over_true": {f"{share:.0%}": round(left / true, 3) for share, (true, left) in moments.items() if left},
    }


def main() -> None:
    """Measure each number of images in a process of its own, and write the result."""
    digits, rows = load_digits(), []
    images, labels = (digits.images * (255 / 16)).astype(np.uint8), digits.target
    with tempfile.TemporaryDirectory() as folder:
        for n in NUMBERS:
            file = Path(folder) / f"{n}.npz"
            np.savez(file, x=np.resize(images, (n, 8, 8)), y=np.resize(labels, n))
            code = (
                f"import json; from pathlib import Path; from benchmarks.load import measured\n"
                f"print(json.dumps(measured(Path({str(file)!r}), Path({folder!r}) / 'run-{n}')))"
            )
            said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append(json.loads(said))
            print(rows[-1])
    machine = {"processor": processor(), "threads": 1, "python": platform.python_version()}
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
