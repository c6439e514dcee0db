"""The tables for the terminal: the results of a run, and the estimate of a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from robustkit.bench.execution.preview import Preview
from robustkit.bench.plan.plan import UNTARGETED, model_under_test_name
from robustkit.bench.reporting.live import duration
from robustkit.bench.statistics.power import DISCORDANT, POWER

__all__ = ["preview_table", "table"]


def preview_table(rows: Sequence[Preview], workers: int) -> Group:
    """The expected cost of each case and the expected time of the run."""
    view = Table(box=box.SIMPLE, padding=(0, 1))
    for name in ("model", "threat", "attack"):
        view.add_column(name, overflow="fold")
    for name in ("forwards", "backwards", "time"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        case = row.case
        name = case.attack if case.goal == UNTARGETED else f"{case.attack} → {case.goal}"
        counts = (f"{row.forwards:,}", f"{row.backwards:,}", duration(row.seconds))
        view.add_row(*(Text(cell) for cell in (case.model_under_test, case.threat, name, *counts)))
    seconds, n = sum(row.seconds for row in rows), rows[0].images
    tried = sorted({row.tried for row in rows})
    first = f"{tried[0]:,}" if len(tried) == 1 else f"{tried[0]:,} to {tried[-1]:,}"
    cases = f"{len(rows)} case{'' if len(rows) == 1 else 's'} of {n:,} images"
    return Group(
        view,
        Text(f"{cases}: about {duration(seconds / workers)} with --workers {workers}.", "bold"),
        Text(_advice(rows[0])),
        Text(f"Measured on the first {first} images of each case; nothing was written."),
    )


def _advice(row: Preview) -> str:
    """The precision that this number of images gives."""
    interval = (
        f"The 95 % interval (Wilson) of a robust accuracy will be at most {100 * row.width:.1f} points wide, "
        f"{100 * row.half_width:.1f} to either side at 50 %, over the choice of images; the rate itself is an upper bound on "
        "robustness. "
    )
    difference, images = row.detectable_difference, row.images_for_half
    if difference is None or images is None:
        return interval + "Too few images to compare two models."
    return interval + (
        f"A paired comparison of two models detects a difference of {100 * difference:.1f} points with {100 * POWER:.0f} % "
        f"power (McNemar's exact test at 5 %), if they differ on {100 * max(DISCORDANT, difference):.0f} % of the images; "
        f"a larger share takes more images. Half of that difference would take {_two_digits(images):,} images."
    )


def _two_digits(count: int) -> int:
    """Rounded to two digits: the power of an exact test is a sawtooth in the number of images."""
    return round(count, min(0, 2 - len(str(count))))


def table(records: Sequence[dict[str, Any]], worst_case: Sequence[dict[str, Any]] = ()) -> Group:
    """The records as one table per model, or model behind a defence.

    Untargeted attacks are first, because only these measure robustness. Where a threat has several attacks, its last row is
    the worst case over them.
    """
    parts: list[RenderableType] = []
    for model in dict.fromkeys(map(_model_under_test, records)):
        unions = [record for record in worst_case if _model_under_test(record) == model and len(record["attacks"]) > 1]
        parts += _of_model([record for record in records if _model_under_test(record) == model], unions)
    parts.append(
        Text(
            "robust: correct before and after the attack, with its 95 % interval (Wilson) over the choice of images; the rate "
            "itself is an upper bound on robustness. For goals other than misclassify, read success instead. cost: forward + "
            "backward passes per image."
        )
    )
    return Group(*parts)


def _model_under_test(record: dict[str, Any]) -> str:
    return model_under_test_name(record["model"], record["defence"])


def _of_model(records: Sequence[dict[str, Any]], worst_case: Sequence[dict[str, Any]]) -> list[RenderableType]:
    # Text, not str: rich would parse [brackets] and :words: in names as markup.
    first = records[0]
    clean = f": {first['clean_accuracy']:.1%} correct of {first['n']:,} images of {first['data']}"
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    # A threat of usual length is not wrapped; the attack is, at its commas.
    view.add_column("threat", overflow="fold", no_wrap=max(len(record["threat"]) for record in records) <= 12)
    view.add_column("attack", overflow="fold")
    for name in ("robust", "95 % interval", "success", "cost", "seconds"):
        view.add_column(name, justify="right", no_wrap=True)
    for threat in dict.fromkeys(record["threat"] for record in records):
        of_threat = [record for record in records if record["threat"] == threat]
        for record in sorted(of_threat, key=lambda r: r["goal"] != UNTARGETED):
            view.add_row(*_row(record))
        for record in worst_case:
            if record["threat"] == threat:
                interval = Text(f"{record['low']:.1%} – {record['high']:.1%}", "dim")
                robust = Text(f"{record['robust_accuracy']:.1%}", "bold")
                view.add_row(Text(threat), Text("worst case", "bold"), robust, interval)
    return [Text.assemble((_model_under_test(first), "bold"), clean), view, *_flags_and_notes(records)]


def _flags_and_notes(records: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """Flags and notes, each once, with the records that it concerns."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for kind in ("flags", "notes"):
            for item in record[kind]:
                rows.setdefault((kind, item["name"], item["why"]), []).append(_label(record))
    lines: list[RenderableType] = []
    for (kind, name, why), labels in rows.items():
        mark = (f"! {name}", "bold red") if kind == "flags" else (name, "")
        lines.append(Text.assemble(mark, f" ({'; '.join(dict.fromkeys(labels))}): {why}"))
    return lines


def _label(record: dict[str, Any]) -> str:
    goal = "" if record["goal"] == UNTARGETED else f" → {record['goal']}"
    return f"{record['attack']}{goal}, {record['threat']}"


def _row(record: dict[str, Any]) -> tuple[Text, ...]:
    untargeted = record["goal"] == UNTARGETED
    figure, other = ("bold", "dim") if untargeted else ("dim", "bold")
    # A space after each comma, so that a narrow terminal wraps there and not inside a number.
    name = record["attack"].replace(",", ", ")
    attack = name if untargeted else f"{name} → {record['goal']}"
    return (
        Text(record["threat"]),
        Text.assemble(attack, (" !", "bold red")) if record["flags"] else Text(attack),
        Text(f"{record['robust_accuracy']:.1%}", figure),
        Text(f"{record['low']:.1%} – {record['high']:.1%}", "dim"),
        Text(f"{record['success_rate']:.1%}", other),
        Text(f"{(record['forwards'] + record['backwards']) / record['n']:,.1f}"),
        Text(f"{record['seconds']:,.1f}"),
    )
