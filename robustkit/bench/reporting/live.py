"""The progress bar of a run: current case, speed and time left."""

from __future__ import annotations

import time
from typing import Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from robustkit.bench.execution.forecast import Forecast
from robustkit.bench.execution.loaded_run import LoadedRun
from robustkit.bench.results.block import Block

__all__ = ["Live", "duration"]


class _Count(ProgressColumn):
    """The number of finished images, and images per second."""

    def render(self, task: Task) -> Text:
        """The speed is that of the last half minute; it is omitted before the first block."""
        speed = task.finished_speed or task.speed or 0
        return Text(f"{task.completed:,.0f}/{task.total or 0:,.0f}" + (f", {speed:,.0f}/s" if speed else ""))


class _Left(ProgressColumn):
    """The time left, estimated from the cost of each case so far."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds; dashes until each case has a finished block."""
        end: float | None = task.fields["end"]
        return Text("-:-- left" if end is None else f"{duration(max(0.0, end - time.monotonic()))} left")


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@final
class Live:
    """A progress bar over all images of all cases; it prints nothing without a terminal."""

    def __init__(self, screen: Console, loaded: LoadedRun, workers: int) -> None:
        # On a narrow terminal the name is shortened, not the figures.
        description = TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        )
        columns = (
            description,
            BarColumn(bar_width=12),
            _Count(table_column=Column(no_wrap=True)),
            _Left(table_column=Column(no_wrap=True)),
        )
        self._bar = Progress(*columns, console=screen, transient=True, expand=True, disable=not screen.is_terminal)
        self._cases = [resolved.case for resolved in loaded.cases]
        images = [len(loaded.images(case)) for case in range(len(self._cases))]
        self._forecast = Forecast(images, workers)
        self._task = self._bar.add_task("preparing", total=sum(images), end=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def progress(self, block: Block, was_stored: bool) -> None:
        """Advance by a block; a block of an earlier run does not count for the speed."""
        case, images = self._cases[block.task.case], len(block.labels)
        now = time.monotonic()
        self._forecast.add(block.task.case, images, block.seconds, None if was_stored else now)
        left = self._forecast.seconds_left()
        end = None if left is None else now + left
        if was_stored:
            done = int(self._bar.tasks[self._task].completed)
            self._bar.reset(self._task, completed=done + images, description="resuming", end=end)
        else:
            name = f"{case.attack} {case.threat} {case.model_under_test}"
            self._bar.update(self._task, description=name, advance=images, end=end)
