"""Executors: every task is run, by real processes that are killed, end with their parent, and report errors."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from robustkit.bench.execution.executors import Processes, Serial
from robustkit.errors import ArgumentError, MissingExtraError, RobustkitError


@dataclass(frozen=True)
class Work:
    """Squares numbers, and logs a line each time that it is made or runs a task."""

    log: str
    behaviour: str = "plain"

    def __call__(self):
        self.log_line("made")
        return self.run

    def log_line(self, word):
        with open(self.log, "a") as file:
            file.write(f"{word} {os.getpid()}\n")

    def run(self, task):
        self.log_line(task)
        if self.behaviour == "dies once" and task == 3 and Path(self.log).read_text().count("\n3 ") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "dies" and task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "refuses" and task == 3:
            raise ArgumentError("three is too many")
        if self.behaviour == "cannot be unpickled" and task == 3:
            raise MissingExtraError("a", "b", ImportError("c"))
        if self.behaviour == "fails" and task == 3:
            raise ZeroDivisionError("a defect")
        if self.behaviour == "sleeps":
            time.sleep(1000)
        return task * task


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").write_text("")
    return str(tmp_path / "log")


def lines(log):
    return [line.split() for line in Path(log).read_text().splitlines()]


def run_all(executor, work, tasks=range(8)):
    return sorted(executor.run(work, tasks))


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Serial(), Processes(1), Processes(2)])
def test_every_task_runs_once_and_the_function_is_made_once_per_worker(executor, log):
    assert run_all(executor, Work(log)) == [n * n for n in range(8)]
    assert sorted(word for word, _ in lines(log) if word != "made") == [str(n) for n in range(8)]
    makers = [pid for word, pid in lines(log) if word == "made"]
    assert len(makers) == len(set(makers)) <= getattr(executor, "workers", 1)
    assert (str(os.getpid()) in makers) == isinstance(executor, Serial)


def test_without_tasks_no_worker_starts(log):
    assert run_all(Processes(2), Work(log), []) == []
    assert lines(log) == []


@pytest.mark.slow
def test_a_killed_worker_is_replaced(log):
    assert run_all(Processes(2), Work(log, "dies once")) == [n * n for n in range(8)]
    counts = Counter(word for word, _ in lines(log) if word != "made")
    assert counts["3"] == 2
    assert max(counts.values()) == 2  # only tasks that were running are repeated
    assert sum(counts.values()) <= 8 + 4


def collect(values, outputs):
    for value in values:
        outputs.append(value)  # one by one, to keep those that come before an error


@pytest.mark.slow
def test_a_task_that_always_kills_its_worker_is_given_up_after_all_others_are_done(log):
    outputs = []
    with pytest.raises(RobustkitError, match=r"workers=2: 3 killed its worker 3 times, .* take a smaller batch_size"):
        collect(Processes(2).run(Work(log, "dies"), range(8)), outputs)
    assert sorted(outputs) == [n * n for n in range(8) if n != 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        ("refuses", ArgumentError, r"^three is too many$"),
        ("cannot be unpickled", ArgumentError, "install it with: pip install 'robustkit"),
        ("fails", RuntimeError, "(?s)a worker failed.*ZeroDivisionError: a defect"),
    ],
)
def test_exceptions_of_a_task_are_raised_in_the_parent(log, behaviour, error, message):
    with pytest.raises(error, match=message):
        run_all(Processes(1), Work(log, behaviour))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended but was not waited for is a zombie.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {folder!r})
from test_executors import Work
from robustkit.bench.execution.executors import Processes
if __name__ == "__main__":
    list(Processes(2).run(Work({log!r}, "sleeps"), range(8)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_ends(tmp_path, log, signal_number):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(Path(__file__).parent), log=log))
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    wait_until(lambda: len([word for word, _ in lines(log) if word != "made"]) == 2)
    workers = [int(pid) for word, pid in lines(log) if word == "made"]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.send_signal(signal_number)
    parent.wait(60)
    wait_until(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize("workers", [0, -1])
def test_less_than_one_worker_is_refused(workers):
    with pytest.raises(ArgumentError, match=f"workers={workers} must be at least 1"):
        Processes(workers)
