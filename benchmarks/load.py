"""Does a run over many images need more memory, and is the forecast of the remaining time correct?

    make load            or            OMP_NUM_THREADS=1 python -m benchmarks.load

The data are digits of scikit-learn (8x8), repeated, in an npz file of uint8; the plan has a cheap and an expensive case. Each
number of images is run in a separate process that writes a folder as `robustkit bench` does. The result is the peak memory,
and the ratio of forecast to actual remaining time after 5 %, 25 %, 50 % and 75 % of the run. It is written to
benchmarks/results/load.json.
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

from benchmarks.machine import peak_memory, processor

RESULT = Path(__file__).parent / "results" / "load.json"
NUMBERS = (2_000, 20_000, 200_000)
MOMENTS = (0.05, 0.25, 0.5, 0.75)


def measure(file: Path, out: Path) -> dict[str, Any]:
    """Run the plan over a file and measure it; needs a new process, because it measures peak memory."""
    from robustkit.bench.execution.forecast import Forecast
    from robustkit.bench.execution.loaded_run import load
    from robustkit.bench.execution.runner import outcomes
    from robustkit.bench.plan.plan import Case, Plan
    from robustkit.bench.run_folder import open_folder

    cases = tuple(Case("zoo:digits-mlp", "linf:0.1", attack) for attack in ("fgsm", "pgd:steps=20"))
    start = time.monotonic()
    loaded = load(Plan(cases, f"npz:{file}"))
    ready, forecast, forecasts = time.monotonic(), Forecast([len(loaded)] * len(cases)), []
    with open_folder(out, loaded.plan) as folder:
        folder.begin(loaded)
        done = []

        def progress(block: Any, found: bool) -> None:
            now = time.monotonic()
            forecast.add(block.task.case, len(block.labels), block.seconds, now)
            forecasts.append((now, forecast.seconds_left()))

        for outcome in outcomes(loaded, folder.store, progress=progress):
            done.append(outcome)
            folder.write(loaded, done)
    end = time.monotonic()
    moments = {
        share: next((end - now, left) for now, left in forecasts if now >= ready + share * (end - ready)) for share in MOMENTS
    }
    return {
        "images": len(loaded),
        "peak_MiB": round(peak_memory(), 1),
        "seconds": round(end - start, 1),
        "of_which_loading": round(ready - start, 1),
        "time_left_told_over_true": {f"{share:.0%}": round(left / true, 3) for share, (true, left) in moments.items() if left},
    }


def main() -> None:
    """Measure each number of images in a new process, and write the result."""
    digits, rows = load_digits(), []
    images, labels = (digits.images * (255 / 16)).astype(np.uint8), digits.target
    with tempfile.TemporaryDirectory() as folder:
        for n in NUMBERS:
            file = Path(folder) / f"{n}.npz"
            np.savez(file, x=np.resize(images, (n, 8, 8)), y=np.resize(labels, n))
            code = (
                f"import json; from pathlib import Path; from benchmarks.load import measure\n"
                f"print(json.dumps(measure(Path({str(file)!r}), Path({folder!r}) / 'run-{n}')))"
            )
            output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
            rows.append(json.loads(output))
            print(rows[-1])
    machine = {"processor": processor(), "threads": 1, "python": platform.python_version()}
    RESULT.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
