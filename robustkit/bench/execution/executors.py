"""Executors: run tasks in this process, or in several worker processes that may die. They know nothing about the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar, final

from robustkit.errors import ArgumentError, RobustkitError

__all__ = ["Executor", "Processes", "Serial"]

Task = TypeVar("Task")
Output = TypeVar("Output")
Factory = Callable[[], Callable[[Task], Output]]


class Executor(ABC):
    """Runs tasks in any order. A task may run more than once, so it must return the same output each time."""

    @abstractmethod
    def run(self, make: Factory[Task, Output], tasks: Sequence[Task]) -> Iterator[Output]:
        """Yield the outputs of the tasks as they finish.

        Args:
            make: Returns the function that runs a task; called once in every process that runs tasks.
            tasks: The tasks.
        """


@final
@dataclass(frozen=True)
class Serial(Executor):
    """Runs tasks one after another in this process."""

    def run(self, make: Factory[Task, Output], tasks: Sequence[Task]) -> Iterator[Output]:
        """Yield the outputs of the tasks, in order."""
        function = make()
        return (function(task) for task in tasks)


@final
@dataclass(frozen=True)
class Processes(Executor):
    """Runs tasks in worker processes. `make`, the tasks and their outputs must be picklable, and `make` hashable.

    If a worker is killed, the pool is replaced. The tasks that were running are repeated at the end, one at a time, so that a
    task that kills its worker does not affect others. Workers end when this process does.

    Attributes:
        workers: The number of processes.
        patience: How many times a task may kill its worker while it runs alone, before it is given up.
    """

    workers: int
    patience: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ArgumentError(f"workers={self.workers} must be at least 1; use one per idle core")

    def run(self, make: Factory[Task, Output], tasks: Sequence[Task]) -> Iterator[Output]:
        """Yield the outputs of the tasks as they finish.

        Raises:
            RobustkitError: A task raised it; or a task killed its worker `patience` times, after all other tasks are done.
        """
        waiting, suspects, deaths = deque(tasks), deque[Task](), Counter[int]()
        failed_starts = 0
        while waiting:
            count = 0
            for output in self._run_until_death(make, waiting, suspects, 2 * self.workers):  # few, so outputs cannot pile up
                count += 1
                yield output
            failed_starts = 0 if count or not suspects else failed_starts + 1
            if failed_starts >= self.patience:
                raise RobustkitError(
                    f"workers={self.workers}: workers died {failed_starts} times in a row before they finished anything, so "
                    'they cannot start; a script must keep its work under if __name__ == "__main__", and workers=1 shows any '
                    "other error"
                )
        given_up: list[Task] = []
        while suspects:
            killers: deque[Task] = deque()
            yield from self._run_until_death(make, suspects, killers, 1)
            for task in killers:
                deaths[id(task)] += 1
                (suspects if deaths[id(task)] < self.patience else given_up).append(task)
        if given_up:
            raise RobustkitError(
                f"workers={self.workers}: {given_up[0]!r} killed its worker {self.patience} times, most likely for lack of "
                "memory; take a smaller batch_size. All other tasks are done"
            )

    def _run_until_death(
        self, make: Factory[Task, Output], waiting: deque[Task], interrupted: deque[Task], max_running: int
    ) -> Iterator[Output]:
        """Yield the outputs of the waiting tasks; if a worker dies, stop and move the running tasks to `interrupted`."""
        running: dict[Future[Any], Task] = {}
        died = False
        with _pool(min(self.workers, max_running)) as pool:
            try:
                while (waiting or running) and not died:
                    while waiting and len(running) < max_running:
                        with _sigint_blocked():
                            future = pool.submit(_run_task, make, waiting[0])
                        running[future] = waiting.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        if isinstance(future.exception(), BrokenProcessPool):
                            died = True
                        else:
                            yield _unwrap(future.result())
                            del running[future]
            except BrokenProcessPool:  # raised by submit
                pass
            finally:
                interrupted.extend(running.values())


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that end at once when this block ends, in whatever way."""
    context = multiprocessing.get_context("spawn")
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (worker_end,))
    try:
        yield pool
    finally:
        parent_end.close()
        worker_end.close()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT, so that processes started here inherit the mask and never see Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(pipe: Connection) -> None:
    """Initialise a worker: it exits when the parent closes its end of the pipe, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    os.dup2(2, 1)  # standard output is for the results alone: what tasks print goes to standard error

    def exit_with_parent() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(0)

    Thread(target=exit_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def _make_once(make: Callable[[], Any]) -> Any:
    """The function that runs a task, made once per worker."""
    return make()


def _run_task(make: Callable[[], Any], task: Any) -> tuple[str, Any]:
    # Exceptions are sent as text: one that cannot be unpickled would break the pool.
    try:
        return "done", _make_once(make)(task)
    except RobustkitError as error:
        return "refused", str(error)
    except (Exception, SystemExit):
        return "failed", traceback.format_exc()


def _unwrap(outcome: tuple[str, Any]) -> Any:
    """The output of a task, or its exception."""
    kind, value = outcome
    if kind == "refused":
        raise ArgumentError(value)
    if kind == "failed":
        raise RuntimeError(f"a worker failed:\n{value}")
    return value
