"""A run that is killed by SIGKILL again and again, and resumed, ends as if nothing had happened.

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
BLOCKS = 6 * 10  # those of linf:0.1 stand on those of linf:0.05
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def started(out, *more):
    words = [sys.executable, "-m", "robustkit", "bench", *WORDS, "--out", str(out), *more]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)


def finished(running):
    _, err = running.communicate(timeout=200)
    assert running.returncode == 0, err


def blocks(out):
    """The blocks that are there, each with what would change if it were written again."""
    found = {}
    for path in (out / "examples").rglob("*.safetensors"):
        told = path.stat()
        found[path.name] = (told.st_ino, told.st_mtime_ns)
    return found


def timeless(out):
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
    return timeless(out)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_resumed_it_ends_as_an_undisturbed_run(undisturbed, tmp_path, workers):
    out = tmp_path / "run"
    struck = []
    for kill in range(KILLS):
        before = blocks(out)
        running = started(out, "--workers", str(workers), "--resume")
        # Moments all over the run: while it loads, right after the first new block, and on to the last ones.
        goal = kill * BLOCKS // KILLS
        while len(blocks(out)) < goal and running.poll() is None:
            time.sleep(0.002)
        if kill == 0:
            time.sleep(1.0)  # in the midst of loading
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=60)
        struck.append(running.returncode == -signal.SIGKILL)
        after = blocks(out)
        assert before.items() <= after.items()  # what was finished has not been touched
    assert sum(struck) >= KILLS - 1  # the last one may come too late
    before = blocks(out)
    finished(started(out, "--workers", str(workers), "--resume"))
    assert before.items() <= blocks(out).items()
    assert len(blocks(out)) == BLOCKS
    assert timeless(out) == undisturbed
