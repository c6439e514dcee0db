"""Output files named on the command line: checked before the work, written atomically."""

from __future__ import annotations

from pathlib import Path

from robustkit.bench.results.store import replace_file
from robustkit.errors import ArgumentError

__all__ = ["check_new", "write_output"]


def check_new(out: Path, suffix: str, why: str) -> None:
    """Refuse a file with another suffix, or one that exists."""
    if out.suffix != suffix:
        raise ArgumentError(f"out={str(out)!r} must end in {suffix}{why}")
    if out.exists():
        raise ArgumentError(f"out={str(out)!r} exists, and nothing is overwritten; name a new file")


def write_output(name: str, path: Path, content: bytes) -> None:
    """Write the file of the option `name`; missing folders are created.

    Raises:
        ArgumentError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise ArgumentError(f"{name}={str(path)!r} cannot be written ({error.strerror}); name another file") from error
