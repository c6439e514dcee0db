"""The machine on which something was measured."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["peak", "processor"]


def processor() -> str:
    """The name of the processor, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak() -> float:
    """The largest memory that this process has taken so far, in MiB.

    Not that of getrusage: there the peak begins with what the process that started this one had taken.
    """
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(told["VmHWM"].split()[0]) / 1024
