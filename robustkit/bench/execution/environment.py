"""What a number depends on besides the plan: versions and hardware; no time, no process, no number of workers."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import torch

import robustkit

__all__ = ["environment"]


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, platform, the device by its name, and the threads that torch uses in each worker."""
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
