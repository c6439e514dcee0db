"""A run on the terminal: what is going on, how fast, how long still, and the table at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def table(records: Sequence[dict[str, Any]]) -> Group:
    """The records as a table for each model; be-wrong goals first, for they alone say how robust a model is."""
    parts: list[RenderableType] = []
    for model in dict.fromkeys(record["model"] for record in records):
        parts += _of_model([record for record in records if record["model"] == model])
    parts.append(
        "robust: right before and after the attack; an upper bound on the truth, with its 95 % interval over the choice of "
        "images. For goals other than misclassify, success is the figure. cost: forwards + backwards for an image."
    )
    return Group(*parts)


def _of_model(records: Sequence[dict[str, Any]]) -> list[RenderableType]:
    first = records[0]
    data = f"{first['n']:,} images of {escape(first['data'])}"
    title = f"[bold]{escape(first['model'])}[/]: right on {first['clean_accuracy']:.1%} of {data}"
    view = Table(title=title, box=box.SIMPLE, padding=(0, 1), title_justify="left")
    for name in ("threat", "attack"):
        view.add_column(name, overflow="fold")
    for name in ("robust", "95 % interval", "success", "cost", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    told: dict[str, str] = {}
    for record in sorted(records, key=lambda r: r["goal"] != "misclassify"):
        view.add_row(*_row(record))
        told |= {f"[bold red]! {escape(flag['name'])}[/]": flag["why"] for flag in record["flags"]}
        told |= {escape(note["name"]): note["why"] for note in record["notes"]}
    return [view, *(Text.from_markup(f"{name}: {escape(why)}") for name, why in told.items())]


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    be_wrong = record["goal"] == "misclassify"
    figure, other = ("bold", "dim") if be_wrong else ("dim", "bold")
    mark = " [bold red]![/]" if record["flags"] else ""
    return (
        escape(record["threat"]),
        escape(record["attack"] if be_wrong else f"{record['attack']} → {record['goal']}") + mark,
        f"[{figure}]{record['robust_accuracy']:.1%}[/]",
        f"[dim]{record['low']:.1%} – {record['high']:.1%}[/]",
        f"[{other}]{record['success_rate']:.1%}[/]",
        f"{(record['forwards'] + record['backwards']) / record['n']:.1f}",
        f"{record['seconds']:.1f}",
    )
