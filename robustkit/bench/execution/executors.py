"""Who does the work: this process, or several that may die. Neither knows what the work is."""

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
Done = TypeVar("Done")
Maker = Callable[[], Callable[[Task], Done]]


class Executor(ABC):
    """Does tasks in any order; each at least once, so a task must come out the same when it is done again."""

    @abstractmethod
    def run(self, make: Maker[Task, Done], tasks: Sequence[Task]) -> Iterator[Done]:
        """What the tasks come to, as they are done.

        Args:
            make: Called once wherever work is done; returns the function that does a task.
            tasks: What to do.
        """


@final
@dataclass(frozen=True)
class Serial(Executor):
    """One after another, here."""

    def run(self, make: Maker[Task, Done], tasks: Sequence[Task]) -> Iterator[Done]:
        """What the tasks come to, in their order."""
        do = make()
        return (do(task) for task in tasks)


@final
@dataclass(frozen=True)
class Processes(Executor):
    """So many processes of their own. `make`, the tasks and what they come to must be picklable, and `make` hashable.

    Where a worker is killed, others take its place, and the tasks that were under way are done again at the end, one at a
    time, so that one that kills does not take the others with it. Workers end when this process does.

    Attributes:
        workers: How many.
        patience: How many times a task may kill its worker, alone, before it is given up.
    """

    workers: int
    patience: int = 3

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ArgumentError(f"workers={self.workers} must be at least 1; one for each idle core is a good number")

    def run(self, make: Maker[Task, Done], tasks: Sequence[Task]) -> Iterator[Done]:
        """What the tasks come to, as they are done.

        Raises:
            RobustkitError: What the work raised of this kind; or a task killed its worker again and again. All others are
                done then.
        """
        left, suspects, deaths = deque(tasks), deque[Task](), Counter[int]()
        vain = 0
        while left:
            count = 0
            for done in self._until_a_death(make, left, suspects, 2 * self.workers):  # so few that results cannot pile up
                count += 1
                yield done
            vain = 0 if count or not suspects else vain + 1
            if vain >= self.patience:
                raise RobustkitError(
                    f"workers={self.workers}: workers died {vain} times in a row before they had done anything, so they cannot "
                    'start; a script must keep its work under if __name__ == "__main__", and one worker alone shows what else '
                    "is wrong"
                )
        given_up: list[Task] = []
        while suspects:
            guilty: deque[Task] = deque()
            yield from self._until_a_death(make, suspects, guilty, 1)
            for task in guilty:
                deaths[id(task)] += 1
                (suspects if deaths[id(task)] < self.patience else given_up).append(task)
        if given_up:
            raise RobustkitError(
                f"workers={self.workers}: {given_up[0]!r} killed its worker {self.patience} times, most likely for want of "
                "memory; take a smaller batch_size. All else that could be done is done"
            )

    def _until_a_death(self, make: Maker[Task, Done], left: deque[Task], lost: deque[Task], most: int) -> Iterator[Done]:
        """What the tasks in `left` come to; if a worker dies, those under way (at most `most`) are `lost`."""
        running: dict[Future[Any], Task] = {}
        died = False
        with _pool(min(self.workers, most)) as pool:
            try:
                while (left or running) and not died:
                    while left and len(running) < most:
                        with _uninterrupted():
                            future = pool.submit(_done, make, left[0])
                        running[future] = left.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        if isinstance(future.exception(), BrokenProcessPool):
                            died = True
                        else:
                            yield _told(future.result())
                            del running[future]
            except BrokenProcessPool:  # when a task was handed over
                pass
            finally:
                lost.extend(running.values())


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Spawned processes that end at once when this block ends, however it does."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (theirs,))
    try:
        yield pool
    finally:
        ours.close()
        theirs.close()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """What is started here does not hear Ctrl-C, from its first moment on; who starts it hears it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(theirs: Connection) -> None:
    """A worker starts: it ends when the other end of the pipe is closed, by its parent or by its parent's death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.dup2(2, 1)  # what the work prints is not the answer, which alone goes to standard output

    def watch() -> None:
        try:
            theirs.recv()
        except (EOFError, OSError):
            os._exit(0)

    Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _made(make: Callable[[], Any]) -> Any:
    """The function that does tasks, made once a worker."""
    return make()


def _done(make: Callable[[], Any], task: Any) -> tuple[str, Any]:
    # Exceptions go as words: one that cannot be unpickled would break the pool.
    try:
        return "done", _made(make)(task)
    except RobustkitError as error:
        return "refused", str(error)
    except (Exception, SystemExit):
        return "failed", traceback.format_exc()


def _told(outcome: tuple[str, Any]) -> Any:
    kind, value = outcome
    if kind == "refused":
        raise ArgumentError(value)
    if kind == "failed":
        raise RuntimeError(f"a worker failed:\n{value}")
    return value
