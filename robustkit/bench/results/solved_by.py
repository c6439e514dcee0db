"""The stage of an attack that solved each image, read from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from robustkit._engine.schema import upgrade_record
from robustkit.bench.plan.plan import Case
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.results.block import block_errors
from robustkit.bench.results.read_run import Run
from robustkit.bench.results.store import block_files

__all__ = ["Solvers", "solvers"]

# For each record, the name of the stage that solved each image, "" for unsolved images, (N,) str.
Solvers = tuple[NDArray[np.str_], ...]


def solvers(run: Run) -> Solvers:
    """The stage that solved each image, for each record of a run, in the order of the records.

    Raises:
        ArgumentError: A file of the run is missing or damaged.
    """
    cases = read_plan(run.path / "plan.toml").cases
    indices = [cases.index(Case.from_record(record)) for record in run.results["records"]]
    return tuple(np.concatenate([_stage_names(file) for file in block_files(run.path, index)]) for index in indices)


def _stage_names(path: Path) -> NDArray[np.str_]:
    """The stage that solved each image of a block."""
    with block_errors(path), safe_open(str(path), framework="np") as file:
        stages = upgrade_record(json.loads((file.metadata() or {})["robustkit"]))["stages"]
        names = np.array([*(stage["name"] for stage in stages), ""], dtype=np.str_)
        return np.asarray(names[file.get_tensor("solver")])  # -1, for unsolved, is the last
