"""The tables of the terminal: what came out of a run, and what a run would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustkit.bench.execution.preview import Preview
from robustkit.bench.reporting.live import duration
from robustkit.bench.statistics.power import DISCORDANT, POWER

__all__ = ["preview_table", "table"]


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
        view.add_row(*(Text(cell) for cell in (case.subject, case.threat, name, *counts)))
    whole, n = sum(row.seconds for row in rows), rows[0].images
    tried = sorted({row.tried for row in rows})
    first = f"{tried[0]:,}" if len(tried) == 1 else f"{tried[0]:,} to {tried[-1]:,}"
    cases = f"{len(rows)} case{'' if len(rows) == 1 else 's'} of {n:,} images"
    return Group(
        view,
        Text(f"{cases}: about {duration(whole / workers)} with --workers {workers}.", "bold"),
        Text(_advice(rows[0])),
        Text(f"Measured on the first {first} images of each case; nothing was written."),
    )


def _advice(row: Preview) -> str:
    """What so many images can tell."""
    told = (
        f"The 95 % interval (Wilson) of a robust accuracy will be at most {100 * row.width:.1f} points wide, "
        f"{100 * row.half_width:.1f} to either side at 50 %, over the choice of images; the rate itself is an upper bound on "
        "robustness. "
    )
    finds, needs = row.detectable_difference, row.images_for_half
    if finds is None or needs is None:
        return told + "Too few images to compare two models at all."
    return told + (
        f"Two models compared image by image: a difference of {100 * finds:.1f} points is found with a chance of "
        f"{100 * POWER:.0f} % (McNemar's exact test at 5 %), if they decide {100 * max(DISCORDANT, finds):.0f} % of the images "
        f"differently; the more of these, the more images it takes. Half of that difference would take {_two_digits(needs):,} "
        "images."
    )


def _two_digits(count: int) -> int:
    """Rounded: the power of an exact test goes up and down from one count to the next."""
    return round(count, min(0, 2 - len(str(count))))


def table(records: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]] = ()) -> Group:
    """The records as a table for each model, or model behind a defence.

    Be-wrong goals come first, for they alone say how robust a model is.

    Where several attacks were run in one threat, a last line says what survives all of them.
    """
    parts: list[RenderableType] = []
    for subject in dict.fromkeys(map(_subject, records)):
        both = [record for record in together if _subject(record) == subject and len(record["attacks"]) > 1]
        parts += _of_model([record for record in records if _subject(record) == subject], both)
    parts.append(
        Text(
            "robust: right before and after the attack, with its 95 % interval (Wilson) over the choice of images; the rate "
            "itself is an upper bound on robustness. For goals other than misclassify, success is the figure. cost: forwards + "
            "backwards for an image."
        )
    )
    return Group(*parts)


def _subject(record: dict[str, Any]) -> str:
    return f"{record['model']} behind {record['defence']}" if record["defence"] else str(record["model"])


def _of_model(records: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]]) -> list[RenderableType]:
    # Text, not str: rich would read [brackets] and :words: in names as markup.
    first = records[0]
    right = f": right on {first['clean_accuracy']:.1%} of {first['n']:,} images of {first['data']}"
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    # A threat of usual length is kept whole; the attack, which may be broken at its commas, gives way.
    view.add_column("threat", overflow="fold", no_wrap=max(len(record["threat"]) for record in records) <= 12)
    view.add_column("attack", overflow="fold")
    for name in ("robust", "95 % interval", "success", "cost", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    for threat in dict.fromkeys(record["threat"] for record in records):
        mine = [record for record in records if record["threat"] == threat]
        for record in sorted(mine, key=lambda r: r["goal"] != "misclassify"):
            view.add_row(*_row(record))
        for record in together:
            if record["threat"] == threat:
                interval = Text(f"{record['low']:.1%} – {record['high']:.1%}", "dim")
                robust = Text(f"{record['robust_accuracy']:.1%}", "bold")
                view.add_row(Text(threat), Text("all together", "bold"), robust, interval)
    return [Text.assemble((_subject(first), "bold"), right), view, *_told(records)]


def _told(records: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """Flags and notes, each once, with the rows that it is about."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for kind in ("flags", "notes"):
            for item in record[kind]:
                rows.setdefault((kind, item["name"], item["why"]), []).append(_who(record))
    lines: list[RenderableType] = []
    for (kind, name, why), who in rows.items():
        mark = (f"! {name}", "bold red") if kind == "flags" else (name, "")
        lines.append(Text.assemble(mark, f" ({'; '.join(dict.fromkeys(who))}): {why}"))
    return lines


def _who(record: dict[str, Any]) -> str:
    goal = "" if record["goal"] == "misclassify" else f" → {record['goal']}"
    return f"{record['attack']}{goal}, {record['threat']}"


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
