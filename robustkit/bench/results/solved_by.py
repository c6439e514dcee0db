"""Which stage of an attack solved which image, read from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from robustkit._engine.schema import upgrade_record
from robustkit.bench.plan.plan import Case
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.store import files_of
from robustkit.errors import ArgumentError

__all__ = ["Solvers", "solvers"]

# For each record the name of the stage that solved each of its images, "" where none did, (N,) text.
Solvers = tuple[NDArray[np.str_], ...]


def solvers(run: Run) -> Solvers:
    """Who solved each image of each record of a run that `past.read` has read, in the order of its records.

    Raises:
        ArgumentError: A file of the run is gone or damaged.
    """
    cases = read_plan(run.path / "plan.toml").cases
    found = []
    for record in run.results["records"]:
        case = Case.of(record)
        found.append(np.concatenate([_of_block(file) for file in files_of(run.path, cases.index(case))]))
    return tuple(found)


def _of_block(path: Path) -> NDArray[np.str_]:
    try:
        with safe_open(str(path), framework="np") as file:
            stages = upgrade_record(json.loads((file.metadata() or {})["robustkit"]))["stages"]
            names = np.array([*(stage["name"] for stage in stages), ""], dtype=np.str_)
            return np.asarray(names[file.get_tensor("solver")])  # -1, which nobody solved, is the last
    except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        raise ArgumentError(f"{str(path)!r} is no block of a run ({error}); remove it and resume the run") from error
