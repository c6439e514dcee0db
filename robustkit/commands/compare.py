"""`robustkit compare`: compare two runs image by image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from robustkit.bench.comparison.compare import compare
from robustkit.bench.reporting.compare_table import as_json, comparison_table
from robustkit.bench.results import read_run as past
from robustkit.bench.results.solved_by import solvers
from robustkit.errors import ArgumentError

__all__ = ["compare_command"]


def compare_command(a: Path, b: Path, format: str = "text") -> None:
    """Print how many images are robust in one run, in the other, or in both.

    Raises:
        ArgumentError: A folder has no run, or the two cannot be compared.
    """
    if format not in ("text", "json"):
        raise ArgumentError(f"format={format!r} must be text or json")
    runs = past.read(a), past.read(b)
    comparison = compare(*runs, solved=(solvers(runs[0]), solvers(runs[1])))
    if format == "json":
        sys.stdout.write(json.dumps(as_json(comparison), indent=1) + "\n")
    else:
        Console().print(comparison_table(comparison))
