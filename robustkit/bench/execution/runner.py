"""Run a plan: compute the missing blocks, and yield each case as soon as all of its blocks are done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit.bench.execution.executors import Executor, Serial
from robustkit.bench.execution.loaded_run import LoadedRun
from robustkit.bench.execution.run_loader import RunLoader
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.record import Record, make_record
from robustkit.bench.results.store import Memory, Store
from robustkit.bench.results.universal_stats import UniversalStats, universal_facts
from robustkit.errors import RobustkitError
from robustkit.result import Result

__all__ = ["Outcome", "Progress", "outcomes"]

Progress = Callable[[Block, bool], None]  # gets a finished block, and whether it was in the store already


@final
@dataclass(frozen=True, eq=False)
class Outcome:
    """The outcome of a case.

    Attributes:
        index: The index of the case in the plan, from 0.
        record: Its record of results.json.
        pictures: Some of its images.
        robust: Which images are correctly classified both before and after the attack, (N,).
    """

    index: int
    record: Record
    pictures: tuple[Picture, ...]
    robust: NDArray[np.bool_]


def outcomes(
    loaded: LoadedRun,
    store: Store | None = None,
    executor: Executor | None = None,
    progress: Progress = lambda block, was_stored: None,
) -> Iterator[Outcome]:
    """Run the cases of a plan; each is yielded when its last block is done, in any order.

    Args:
        loaded: The loaded run.
        store: Keeps the blocks; those that it has are not computed again. By default in memory.
        executor: Computes the blocks. By default this process.
        progress: Called with every block.
    """
    store, executor = Memory() if store is None else store, Serial() if executor is None else executor
    tasks = loaded.tasks()
    tasks_of: dict[int, list[Task]] = {case: [] for case in range(len(loaded.cases))}
    for task in tasks:
        tasks_of[task.case].append(task)
    pending, missing = {case: set(of_case) for case, of_case in tasks_of.items()}, []
    for task in tasks:
        block = store.get(task)
        if block is None:
            missing.append(task)
        else:
            pending[task.case].discard(task)
            progress(block, True)
    yield from (_outcome(loaded, store, tasks_of[case], case) for case, of_case in pending.items() if not of_case)
    for blocks in executor.run(RunLoader(loaded.plan, loaded, store=store.shared), loaded.schedule.chains(missing)):
        for block in blocks:
            case = block.task.case
            store.put(block)
            pending[case].discard(block.task)
            progress(block, False)
            if not pending[case]:
                yield _outcome(loaded, store, tasks_of[case], case)


def _outcome(loaded: LoadedRun, store: Store, tasks: Sequence[Task], case: int) -> Outcome:
    """Join the blocks of a case, in the order of their images."""
    images, resolved, seconds = loaded.images(case), loaded.cases[case], 0.0
    n = len(images)
    # Allocated once: thousands of small tensors kept until the end would fragment the memory.
    whole, correct, robust = Result.allocate(torch.empty(n, 0)), np.empty(n, np.bool_), np.empty(n, np.bool_)
    messages = Result.allocate(torch.empty(0, 0))
    pictures: list[Picture] = []
    universal: list[UniversalStats] = []
    for task in tasks:
        block = _stored_block(store, task)
        without_images = replace(block.result, x_adv=torch.empty(len(block.result), 0))
        rows = slice(task.first - images.start, task.last - images.start)
        messages = Result.cat([messages, whole.write(rows, without_images)])
        correct[rows], robust[rows] = block.correct, block.robust
        pictures += block.pictures
        universal += [block.universal] if block.universal is not None else []
        seconds += block.seconds
    record = make_record(
        resolved.case,
        loaded.plan,
        attack=resolved.attack,
        result=whole.with_messages(messages),
        correct=correct,
        robust=robust,
        seconds=seconds,
        model_hash=loaded.weight_hashes[resolved.case.model_under_test],
    )
    record |= loaded.target_facts(case)
    if universal:
        record |= universal_facts(record, universal, loaded.labels(case), loaded.classes)
    return Outcome(case, record, tuple(pictures), robust)


def _stored_block(store: Store, task: Task) -> Block:
    block = store.get(task)
    if block is None:
        raise RobustkitError(
            f"block {task.name} of case {task.case + 1} is missing or damaged; resume the run to compute it again"
        )
    return block
