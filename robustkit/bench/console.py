"""A run on the terminal: what is going on, how fast, how long still, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["live", "table"]


class _Speed(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """The speed over the last half minute."""
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} images/s")


def live(console: Console) -> Progress:
    """A progress bar over all images of all cases; silent where there is no terminal."""
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
