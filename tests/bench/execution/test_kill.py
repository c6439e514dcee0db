"""A run that is killed by SIGKILL several times, and resumed, has the results of an undisturbed run.

The environment variable KILLS is the number of kills; `make kills` makes twenty for one worker and for two.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

KILLS = int(os.environ.get("KILLS", "3"))
WORDS = [
    "--model",
    "zoo:digits-mlp",
    "--data",
    "digits",
    "--limit",
    "60",
    "--block",
    "6",
    "--threat",
    "linf:0.1",
    "--threat",
    "l2:1",
    "--threat",
    "linf:0.05",
    "--attack",
    "pgd:steps=20",
    "--goal",
    "misclassify",
    "--goal",
    "least-likely",
]
BLOCKS = 6 * 10  # those of linf:0.1 start from those of linf:0.05
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def started(out, *more):
    words = [sys.executable, "-m", "robustkit", "bench", *WORDS, "--out", str(out), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)


def finished(running):
    _, err = running.communicate(timeout=200)
    assert running.returncode == 0, err


def blocks(out):
    """The finished blocks, each with what would change if it were written again."""
    files = {}
    for path in (out / "examples").rglob("*.safetensors"):
        stat = path.stat()
        files[path.name] = (stat.st_ino, stat.st_mtime_ns)
    return files


def without_seconds(out):
    def stripped(value):
        if isinstance(value, dict):
            return {key: stripped(item) for key, item in value.items() if key != "seconds"}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    return json.dumps(stripped(json.loads((out / "results.json").read_text())))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(started(out))
    assert len(blocks(out)) == BLOCKS
    return without_seconds(out)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_and_resumed_run_equals_an_undisturbed_run(undisturbed, tmp_path, workers):
    out = tmp_path / "run"
    killed = []
    for kill in range(KILLS):
        before = blocks(out)
        running = started(out, "--workers", str(workers), "--resume")
        # Kills are spread over the run: while it loads, right after the first new block, and up to the last blocks.
        goal = kill * BLOCKS // KILLS
        while len(blocks(out)) < goal and running.poll() is None:
            time.sleep(0.002)
        if kill == 0:
            time.sleep(1.0)  # while it loads
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
        killed.append(running.returncode == -signal.SIGKILL)
        after = blocks(out)
        assert before.items() <= after.items()  # finished blocks have not been touched
    assert sum(killed) >= KILLS - 1  # the run may end before the last one
    before = blocks(out)
    finished(started(out, "--workers", str(workers), "--resume"))
    assert before.items() <= blocks(out).items()
    assert len(blocks(out)) == BLOCKS
    assert without_seconds(out) == undisturbed
