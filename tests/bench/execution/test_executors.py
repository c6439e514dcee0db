"""Who does the work: every task is done, by real processes that are killed, end with their parent, and tell what went wrong."""

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
    """Squares numbers, and leaves a line for every time that it was made or did something."""

    log: str
    manner: str = "plain"

    def __call__(self):
        self.note("made")
        return self.do

    def note(self, word):
        with open(self.log, "a") as file:
            file.write(f"{word} {os.getpid()}\n")

    def do(self, task):
        self.note(task)
        if self.manner == "dies once" and task == 3 and Path(self.log).read_text().count("\n3 ") == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.manner == "dies" and task == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.manner == "refuses" and task == 3:
            raise ArgumentError("three is too many")
        if self.manner == "cannot be unpickled" and task == 3:
            raise MissingExtraError("a", "b", ImportError("c"))
        if self.manner == "fails" and task == 3:
            raise ZeroDivisionError("a defect")
        if self.manner == "sleeps":
            time.sleep(1000)
        return task * task


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").write_text("")
    return str(tmp_path / "log")


def lines(log):
    return [line.split() for line in Path(log).read_text().splitlines()]


def done(executor, work, tasks=range(8)):
    return sorted(executor.run(work, tasks))


@pytest.mark.parametrize("executor", [Serial(), Processes(1), Processes(2)])
def test_every_task_is_done_once_and_the_work_is_made_once_a_worker(executor, log):
    assert done(executor, Work(log)) == [n * n for n in range(8)]
    assert sorted(word for word, _ in lines(log) if word != "made") == [str(n) for n in range(8)]
    makers = [pid for word, pid in lines(log) if word == "made"]
    assert len(makers) == len(set(makers)) <= getattr(executor, "workers", 1)
    assert (str(os.getpid()) in makers) == isinstance(executor, Serial)


def test_nothing_to_do_starts_nothing(log):
    assert done(Processes(2), Work(log), []) == []
    assert lines(log) == []


def test_a_killed_worker_is_replaced(log):
    assert done(Processes(2), Work(log, "dies once")) == [n * n for n in range(8)]
    counts = Counter(word for word, _ in lines(log) if word != "made")
    assert counts["3"] == 2
    assert max(counts.values()) == 2  # what was under way beside it is done again, and nothing else
    assert sum(counts.values()) <= 8 + 4


def collect(values, found):
    for value in values:
        found.append(value)  # one by one: what comes before an error is wanted


def test_work_that_kills_again_and_again_is_given_up_and_what_can_be_done_is_done(log):
    found = []
    with pytest.raises(RobustkitError, match=r"workers=2: 3 killed its worker 3 times, .* take a smaller batch_size"):
        collect(Processes(2).run(Work(log, "dies"), range(8)), found)
    assert sorted(found) == [n * n for n in range(8) if n != 3]


@pytest.mark.parametrize(
    ("manner", "error", "told"),
    [
        ("refuses", ArgumentError, r"^three is too many$"),
        ("cannot be unpickled", ArgumentError, "install it with: pip install 'robustkit"),
        ("fails", RuntimeError, "(?s)a worker failed.*ZeroDivisionError: a defect"),
    ],
)
def test_what_the_work_raises_is_told(log, manner, error, told):
    with pytest.raises(error, match=told):
        done(Processes(1), Work(log, manner))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended stays until its parent asks; a stranger's is a zombie here.
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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_when_their_parent_does(tmp_path, log, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(folder=str(Path(__file__).parent), log=log))
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    wait_until(lambda: len([word for word, _ in lines(log) if word != "made"]) == 2)
    workers = [int(pid) for word, pid in lines(log) if word == "made"]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.send_signal(how)
    parent.wait(60)
    wait_until(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize("workers", [0, -1])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers):
    with pytest.raises(ArgumentError, match=f"workers={workers} must be at least 1"):
        Processes(workers)
