"""Facts about the machine of a measurement."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["peak_memory", "processor"]


def processor() -> str:
    """Return the name of the processor, or its architecture if the system does not report a name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_memory() -> float:
    """Return the peak memory of this process so far, in MiB.

    getrusage is not used: its peak includes memory of the parent process.
    """
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024
