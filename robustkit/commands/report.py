"""`robustkit report`: write the report of an earlier run again and print its table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from robustkit.bench.reporting.page import report
from robustkit.bench.reporting.table import table
from robustkit.bench.results import read_run as past
from robustkit.bench.results.store import replace_file
from robustkit.errors import ArgumentError

__all__ = ["report_command"]


def report_command(path: Path) -> None:
    """Write report.html again from the files of the run, and print the table."""
    run, screen = past.read(path), Console()
    if not run.results["records"]:
        raise ArgumentError(
            f"run={str(path)!r} has no finished case yet; continue it with: robustkit bench --out {path} --resume"
        )
    page = report(run.results, run.pictures, command=run.results["command"])
    try:
        replace_file(path / "report.html", page.encode("utf-8"))
    except OSError as error:
        raise ArgumentError(f"run={str(path)!r} cannot be written ({error.strerror}); copy the folder first") from error
    screen.print(table(run.results["records"], run.results["worst_case"]))
    done, cases = len(run.results["records"]), run.results["cases"]
    if done < cases:
        screen.print(Text(f"{done} of {cases} cases are finished", "bold"))
    screen.print(Text(f"report: {path / 'report.html'}"), soft_wrap=True)
