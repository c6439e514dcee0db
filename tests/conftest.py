"""Set-up of the tests: one thread, hypothesis profiles, and a count of all generated cases."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
for profile, examples in (("quick", 3), ("tests", 20)):  # `make quick` and `make test`
    settings.register_profile(
        profile, max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
settings.register_profile(
    "nightly",
    max_examples=int(os.environ.get("CASES", "1000")),
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
os.environ.setdefault("HYPOTHESIS_PROFILE", "tests")
settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])
COUNT = pytest.StashKey[int]()


@pytest.fixture
def cases(request):
    """Call it with the number of generated cases that a check ran; the summary shows the sum."""

    def count(number):
        request.config.stash[COUNT] = request.config.stash.get(COUNT, 0) + number

    return count


def pytest_sessionfinish(session):
    """A worker passes its count to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cases"] = session.config.stash.get(COUNT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Add the count of a worker."""
    count = getattr(node, "workeroutput", {}).get("cases", 0)
    node.config.stash[COUNT] = node.config.stash.get(COUNT, 0) + count


def pytest_terminal_summary(terminalreporter, config):
    if config.stash.get(COUNT, 0):
        terminalreporter.write_line(f"{config.stash[COUNT]:,} generated cases over the laws")
