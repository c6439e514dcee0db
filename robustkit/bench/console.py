"""A run on the terminal: what is going on, how fast, how long still, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self, final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from robustkit.bench.block import Block
from robustkit.bench.forecast import Forecast
from robustkit.bench.loaded import Loaded
from robustkit.bench.preview import Preview

__all__ = ["Live", "duration", "preview_table", "table"]


class _Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """The speed over the last half minute."""
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} images/s")


class _Left(ProgressColumn):
    """Time to go, by what each case has been seen to cost."""

    def render(self, task: Task) -> Text:
        """Minutes and seconds; dashes until every case has been tried."""
        end: float | None = task.fields["end"]
        return Text("time left -:--" if end is None else f"time left {duration(max(0.0, end - time.monotonic()))}")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as on a clock."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@final
class Live:
    """A bar over all images of all cases, with images per second and time left; silent where there is no terminal."""

    def __init__(self, screen: Console, loaded: Loaded, workers: int) -> None:
        words = TextColumn("{task.description}", markup=False)
        columns = (words, BarColumn(bar_width=None), MofNCompleteColumn(), _Speed(), _Left())
        self._bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._cases = [trial.case for trial in loaded.trials]
        self._forecast = Forecast([len(loaded)] * len(self._cases), workers)
        self._task = self._bar.add_task("preparing", total=len(loaded) * len(self._cases), end=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def progress(self, block: Block, found: bool) -> None:
        """Move on by a block; one that was there before says nothing of the speed."""
        case, images = self._cases[block.task.case], len(block.labels)
        now = time.monotonic()
        self._forecast.add(block.task.case, images, block.seconds, None if found else now)
        left = self._forecast.left()
        end = None if left is None else now + left
        words = f"{case.model} {case.threat} {case.attack}"
        if found:
            done = int(self._bar.tasks[self._task].completed)
            self._bar.reset(self._task, completed=done + images, description="resuming", end=end)
        else:
            self._bar.update(self._task, description=words, advance=images, end=end)


def preview_table(rows: Sequence[Preview], workers: int) -> Group:
    """What each case would take, and all of them."""
    view = Table(box=box.SIMPLE, padding=(0, 1))
    for name in ("model", "threat", "attack"):
        view.add_column(name, overflow="fold")
    for name in ("forwards", "backwards", "time"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        case = row.case
        name = case.attack if case.goal == "misclassify" else f"{case.attack} → {case.goal}"
        counts = (f"{row.forwards:,}", f"{row.backwards:,}", duration(row.seconds))
        view.add_row(*(Text(cell) for cell in (case.model, case.threat, name, *counts)))
    whole, n = sum(row.seconds for row in rows), rows[0].images
    tried = sorted({row.tried for row in rows})
    first = f"{tried[0]:,}" if len(tried) == 1 else f"{tried[0]:,} to {tried[-1]:,}"
    cases = f"{len(rows)} case{'' if len(rows) == 1 else 's'} of {n:,} images"
    return Group(
        view,
        Text(f"{cases}: about {duration(whole / workers)} with --workers {workers}.", "bold"),
        Text(f"The 95 % interval of a robust accuracy will be at most {rows[0].width:.1%} wide (over the choice of images)."),
        Text(f"Measured on the first {first} images of each case; nothing was written."),
    )


def table(records: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]] = ()) -> Group:
    """The records as a table for each model; be-wrong goals first, for they alone say how robust a model is.

    Where several attacks were run in one threat, a last line says what survives all of them.
    """
    parts: list[RenderableType] = []
    for model in dict.fromkeys(record["model"] for record in records):
        both = [record for record in together if record["model"] == model and len(record["attacks"]) > 1]
        parts += _of_model([record for record in records if record["model"] == model], both)
    parts.append(
        Text(
            "robust: right before and after the attack; an upper bound on the truth, with its 95 % interval over the choice "
            "of images. For goals other than misclassify, success is the figure. cost: forwards + backwards for an image."
        )
    )
    return Group(*parts)


def _of_model(records: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]]) -> list[RenderableType]:
    # Text, not str: rich would read [brackets] and :words: in names as markup.
    first = records[0]
    right = f": right on {first['clean_accuracy']:.1%} of {first['n']:,} images of {first['data']}"
    view = Table(box=box.SIMPLE, padding=(0, 1))
    for name in ("threat", "attack"):
        view.add_column(name, overflow="fold")
    for name in ("robust", "95 % interval", "success", "cost", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    told: dict[str, Text] = {}
    for record in sorted(records, key=lambda r: r["goal"] != "misclassify"):
        view.add_row(*_row(record))
        for flag in record["flags"]:
            told[flag["name"] + flag["why"]] = Text.assemble(
                (f"! {flag['name']}", "bold red"), f" ({_who(record)}): {flag['why']}"
            )
        for note in record["notes"]:
            told.setdefault(note["name"] + note["why"], Text(f"{note['name']} ({_who(record)}): {note['why']}"))
    for record in together:
        interval = Text(f"{record['low']:.1%} – {record['high']:.1%}", "dim")
        view.add_row(
            Text(record["threat"]), Text("all together", "bold"), Text(f"{record['robust_accuracy']:.1%}", "bold"), interval
        )
    return [Text.assemble((first["model"], "bold"), right), view, *told.values()]


def _who(record: dict[str, Any]) -> str:
    return f"{record['attack']}, {record['threat']}"


def _row(record: dict[str, Any]) -> tuple[Text, ...]:
    be_wrong = record["goal"] == "misclassify"
    figure, other = ("bold", "dim") if be_wrong else ("dim", "bold")
    # A space after each comma, so that a narrow terminal breaks there and not inside a number.
    name = record["attack"].replace(",", ", ")
    attack = name if be_wrong else f"{name} → {record['goal']}"
    return (
        Text(record["threat"]),
        Text.assemble(attack, (" !", "bold red")) if record["flags"] else Text(attack),
        Text(f"{record['robust_accuracy']:.1%}", figure),
        Text(f"{record['low']:.1%} – {record['high']:.1%}", "dim"),
        Text(f"{record['success_rate']:.1%}", other),
        Text(f"{(record['forwards'] + record['backwards']) / record['n']:,.1f}"),
        Text(f"{record['seconds']:,.1f}"),
    )
