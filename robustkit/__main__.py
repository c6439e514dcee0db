"""`python -m robustkit` and the `robustkit` command."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit with its code."""
    # By default the threads of torch wait by spinning, which is 20 times slower when another process uses the core. The
    # variable is read when torch is imported, so it is set first.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # for terminals without Unicode and file names that are not Unicode
    from robustkit.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
