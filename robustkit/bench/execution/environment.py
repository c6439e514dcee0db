"""What numbers depend on besides the plan: versions, hardware and threads; not the time, the host or the number of workers."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch

import robustkit

__all__ = ["environment", "torch_threads"]


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, the platform, the name of the device, and the number of threads that torch uses in each worker."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "robustkit": robustkit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "device": torch.cuda.get_device_name(device) if cuda else device,
    }


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of torch threads, and restore the previous number afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
