"""The folder of a run: results.json and report.html, each written aside and renamed, so that none is ever half there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy
import torch

import robustkit
from robustkit.bench.record import Record, together
from robustkit.bench.report import report
from robustkit.bench.runner import Outcome
from robustkit.errors import ArgumentError

__all__ = ["SCHEMA", "environment", "new_folder", "records_of", "write"]

SCHEMA = 1


@contextmanager
def new_folder(out: Path | None) -> Iterator[Path]:
    """A new folder for a run; default one of the present date and time under runs/. It goes again if it stays empty.

    Raises:
        ArgumentError: It exists, or cannot be made.
    """
    folder = out if out is not None else Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        made = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise ArgumentError(f"out={str(folder)!r} exists; nothing is overwritten: name a new folder") from error
    except OSError as error:
        raise ArgumentError(f"out={str(folder)!r} cannot be made ({error.strerror}); name another folder") from error
    try:
        yield folder
    finally:
        with suppress(OSError):  # not empty, as it should be
            for part in made:
                part.rmdir()


def environment(device: str) -> dict[str, Any]:
    """What a result depends on besides the plan: versions and hardware, no time and no process."""
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if cuda else device,
    }


def records_of(outcomes: Sequence[Outcome]) -> tuple[list[Record], list[Record]]:
    """The records of the cases, and those of all attacks together."""
    return [outcome.record for outcome in outcomes], together([(outcome.record, outcome.robust) for outcome in outcomes])


def write(folder: Path, outcomes: Sequence[Outcome], *, device: str, command: str) -> None:
    """Write results.json and report.html of the cases so far."""
    records, combined = records_of(outcomes)
    pictures = [picture for outcome in outcomes for picture in outcome.pictures]
    results = {
        "robustkit": robustkit.__version__,
        "schema": SCHEMA,
        "environment": environment(device),
        "command": command,
        "together": combined,
        "records": records,
    }
    _replace(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _replace(folder / "report.html", report(results, pictures, command=command))


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold what is no Unicode
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
