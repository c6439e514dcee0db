"""`python -m robustkit` and the `robustkit` command."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    # Threads of torch that wait by spinning make everything 20 times slower as soon as another process wants the core;
    # this is read when torch is imported, so it is set before anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # a terminal, or a file name, that knows no Unicode
    from robustkit.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
