"""Runs a plan: the blocks that are missing are done, and each case is told as soon as it has all of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit.bench.execution.executors import Executor, Serial
from robustkit.bench.execution.loaded_run import LoadedRun, RunLoader
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.record import Record, make_record
from robustkit.bench.results.store import Memory, Store
from robustkit.bench.results.universal_stats import UniversalStats, universal_facts
from robustkit.errors import RobustkitError
from robustkit.result import Result

__all__ = ["Outcome", "Progress", "outcomes"]

Progress = Callable[[Block, bool], None]  # a block that is there, and whether it was found or done just now


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """What a case came to.

    Attributes:
        index: Which case of the plan, from 0.
        record: Its row of results.json.
        pictures: A few of its images.
        robust: Which images stayed right, before and after, (N,).
    """

    index: int
    record: Record
    pictures: tuple[Picture, ...]
    robust: NDArray[np.bool_]


def outcomes(
    loaded: LoadedRun,
    store: Store | None = None,
    executor: Executor | None = None,
    progress: Progress = lambda block, found: None,
) -> Iterator[Outcome]:
    """Measure the cases of a plan; each comes out when its last block is there, in whatever order.

    Args:
        loaded: What to measure.
        store: Where blocks are kept; those that are there are not done again. Default: in memory.
        executor: Who does them. Default: this process.
        progress: Called with every block.
    """
    store, executor = Memory() if store is None else store, Serial() if executor is None else executor
    tasks = loaded.tasks()
    mine: dict[int, list[Task]] = {case: [] for case in range(len(loaded.trials))}
    for task in tasks:
        mine[task.case].append(task)
    wanted, missing = {case: set(of_case) for case, of_case in mine.items()}, []
    for task in tasks:
        block = store.get(task)
        if block is None:
            missing.append(task)
        else:
            wanted[task.case].discard(task)
            progress(block, True)
    yield from (_outcome(loaded, store, mine[case], case) for case, left in wanted.items() if not left)
    for done in executor.run(RunLoader(loaded.plan, loaded, store=store.shared), loaded.chains(missing)):
        for block in done:
            case = block.task.case
            store.put(block)
            wanted[case].discard(block.task)
            progress(block, False)
            if not wanted[case]:
                yield _outcome(loaded, store, mine[case], case)


def _outcome(loaded: LoadedRun, store: Store, tasks: Sequence[Task], case: int) -> Outcome:
    """What the blocks of a case, all its `tasks`, add up to, in the order of their images, whoever did them when."""
    images, trial, seconds = loaded.images(case), loaded.trials[case], 0.0
    n = len(images)
    # Room made before: thousands of small parts kept until the end would leave the memory in pieces.
    room, clean, robust = Result.allocate(torch.empty(n, 0)), np.empty(n, np.bool_), np.empty(n, np.bool_)
    told = Result.allocate(torch.empty(0, 0))
    pictures: list[Picture] = []
    spreads: list[UniversalStats] = []
    for task in tasks:
        block = _there(store, task)
        facts = replace(block.result, x_adv=torch.empty(len(block.result), 0))
        rows = slice(task.first - images.start, task.last - images.start)
        told = Result.cat([told, room.write(rows, facts)])
        clean[rows], robust[rows] = block.clean, block.robust
        pictures += block.pictures
        spreads += [block.spread] if block.spread is not None else []
        seconds += block.seconds
    result = room.with_messages(told)
    record = make_record(
        trial.case,
        loaded.plan,
        attack=trial.attack,
        result=result,
        clean=clean,
        robust=robust,
        seconds=seconds,
        model_hash=loaded.weights[trial.case.subject],
    )
    record |= loaded.ways(case)
    if spreads:
        record |= universal_facts(record, spreads, loaded.labels(case), loaded.classes)
    return Outcome(case, record, tuple(pictures), robust)


def _there(store: Store, task: Task) -> Block:
    block = store.get(task)
    if block is None:
        raise RobustkitError(f"block {task.name} of case {task.case + 1} is gone or damaged; resume the run to do it again")
    return block
