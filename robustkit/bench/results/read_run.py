"""Read an earlier run from its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from robustkit._engine.schema import upgrade_results
from robustkit.bench.plan.plan import Case
from robustkit.bench.plan.plan_file import read_plan
from robustkit.bench.results.block import Block
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.store import block_files
from robustkit.errors import ArgumentError

__all__ = ["Run", "read"]


@final
@dataclass(frozen=True, eq=False)
class Run:
    """An earlier run.

    Attributes:
        path: Its folder.
        results: The content of its results.json.
        robust: For each record, which images are classified correctly before and after the attack, (N,) bool.
        pictures: Some of its images.
    """

    path: Path
    results: dict[str, Any]
    robust: tuple[NDArray[np.bool_], ...]
    pictures: tuple[Picture, ...] = ()


def read(path: Path) -> Run:
    """Read the cases of a run that results.json contains; the run need not be finished. Files of schema 1 are converted.

    Raises:
        ArgumentError: There is no run, or a file of it is missing or damaged.
    """
    try:
        results = upgrade_results(json.loads((path / "results.json").read_text(encoding="utf-8")))
        records = [(Case.from_record(record), int(record["n"])) for record in results["records"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"run={str(path)!r} has no readable results.json ({error}); name a folder written by robustkit bench"
        ) from error
    cases = read_plan(path / "plan.toml").cases
    masks: list[NDArray[np.bool_]] = []
    pictures: list[Picture] = []
    for case, n in records:
        if case not in cases:
            raise ArgumentError(f"run={str(path)!r}: results.json and plan.toml do not belong together; run it again")
        robust, case_pictures = _read_case(path, cases.index(case), n)
        masks.append(robust)
        pictures += case_pictures
    return Run(path, results, tuple(masks), tuple(pictures))


def _read_case(run: Path, case: int, n: int) -> tuple[NDArray[np.bool_], list[Picture]]:
    """Which of the n images of a case are robust, and its pictures."""
    robust, done, first = np.zeros(n, np.bool_), 0, None
    pictures: list[Picture] = []
    for file in block_files(run, case):
        block = Block.load(file)
        first = block.task.first if first is None else first  # not 0 if a universal attack learned on the first images
        robust[block.task.first - first : block.task.last - first] = block.robust
        pictures += block.pictures
        done += block.task.last - block.task.first
    if done != n:
        raise ArgumentError(f"run={str(run)!r} has {done} of the {n} images of case {case + 1}; resume it, or run it again")
    return robust, pictures
