"""A run as its folder tells it."""

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
from robustkit.errors import ArgumentError

__all__ = ["Run", "read"]


@final
@dataclass(frozen=True, eq=False)
class Run:
    """A run that was made before.

    Attributes:
        path: Its folder.
        results: The content of its results.json.
        robust: For each record, in their order, which images were right before and after the attack, (N,) bool.
        pictures: Some of its images.
    """

    path: Path
    results: dict[str, Any]
    robust: tuple[NDArray[np.bool_], ...]
    pictures: tuple[Picture, ...] = ()


def read(path: Path) -> Run:
    """Read the folder of a run, finished or not: the cases that results.json tells of.

    Raises:
        ArgumentError: There is no run, or a file of it is missing or damaged.
    """
    try:
        results = upgrade_results(json.loads((path / "results.json").read_text(encoding="utf-8")))
        records = [(Case.of(r), int(r["n"])) for r in results["records"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"run={str(path)!r} holds no readable results.json ({error}); name a folder that robustkit bench has written"
        ) from error
    cases = read_plan(path / "plan.toml").cases
    masks: list[NDArray[np.bool_]] = []
    pictures: list[Picture] = []
    for case, n in records:
        if case not in cases:
            raise ArgumentError(f"run={str(path)!r}: results.json and plan.toml do not belong together; make the run anew")
        robust, some = _examples(path / "examples" / f"case-{cases.index(case) + 1:02d}", n)
        masks.append(robust)
        pictures += some
    return Run(path, results, tuple(masks), tuple(pictures))


def _examples(folder: Path, n: int) -> tuple[NDArray[np.bool_], list[Picture]]:
    """Which of the n images of a case stayed right, and its pictures."""
    robust, done, first = np.zeros(n, np.bool_), 0, None
    pictures: list[Picture] = []
    for file in sorted(folder.glob("*.safetensors")):
        block = Block.load(file)
        first = block.task.first if first is None else first  # a universal attack may have left out those it learned on
        robust[block.task.first - first : block.task.last - first] = block.robust
        pictures += block.pictures
        done += block.task.last - block.task.first
    if done != n:
        raise ArgumentError(f"{str(folder)!r} tells of {done} of {n} images; resume the run, or make it anew")
    return robust, pictures
