"""Whole curves as charts, against cost and against eps, and what each stage of an attack has solved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robustkit.bench.reporting.chart import Chart, Line, Point, Subject
from robustkit.bench.reporting.eps_charts import AXES, place_of

__all__ = ["USUAL", "cost_charts", "eps_charts", "stage_tables"]

Record = Mapping[str, Any]  # one record of results.json

_UNTARGETED = "misclassify"
USUAL = frozenset({"clean", "attack", "learning"})  # stages of every attack


def cost_charts(records: Iterable[Record]) -> list[tuple[str, Chart]]:
    """For each model and threat the curves of its attacks against what an image has cost; with the threat."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        if record.get("against_cost"):
            groups[record["model"], record["defence"], record["data"], record["threat"]].append(record)
    charts = []
    for (model, defence, data, threat), rows in groups.items():
        names = _names(rows)
        lines = tuple(
            Line(name, _points(row["against_cost"], row["n"]), style, main=True, only=len(rows) == 1, marked=False)
            for style, (name, row) in enumerate(zip(names, rows, strict=True))
        )
        widest = max(point.eps for line in lines for point in line.points)
        axis = "forwards + 2 × backwards, per image"
        charts.append((threat, Chart(axis, data, (model, defence), lines, widest, stairs=True, logarithmic=True)))
    return charts


def eps_charts(records: Sequence[Record]) -> list[Chart]:
    """For each run that holds a curve against eps: the curves of a model, and the other attacks at the eps that they had."""
    groups: dict[tuple[Subject, str, str], list[Record]] = defaultdict(list)
    for record in records:
        place = place_of(record["threat"])
        if place is not None and record["goal"] == _UNTARGETED:
            groups[(record["model"], record["defence"]), record["data"], place[0]].append(record)
    charts = []
    for (subject, data, norm), rows in groups.items():
        whole = [row for row in rows if row.get("against_eps")]
        if whole:
            charts.append(_eps_chart(subject, data, norm, whole, [row for row in rows if not row.get("against_eps")]))
    return charts


def _eps_chart(subject: Subject, data: str, norm: str, whole: Sequence[Record], others: Sequence[Record]) -> Chart:
    names = _names([*whole, *others])
    lines = [
        Line(name, _points(row["against_eps"], row["n"]), style, main=True, only=len(whole) == 1, marked=False)
        for style, (name, row) in enumerate(zip(names, whole, strict=False))
    ]
    widest = max(point.eps for line in lines for point in line.points)
    spots: dict[str, list[Point]] = defaultdict(list)
    for name, row in zip(names[len(whole) :], others, strict=True):
        place = place_of(row["threat"])
        if place is not None and place[1] <= widest:
            written = str(row["threat"]).partition(":")[2].strip()
            spots[name].append(Point(place[1], written, row["robust_accuracy"], row["n"], (row["low"], row["high"])))
    dots = [
        Line(name, tuple(sorted(points, key=lambda point: point.eps)), len(lines) + style, main=False)
        for style, (name, points) in enumerate(spots.items())
    ]
    return Chart(AXES[norm], data, subject, (*lines, *dots), widest, stairs=True)


def stage_tables(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The stages of each attack that has some of its own: what each solved, what it left, and what it cost an image."""
    tables = []
    for record in records:
        stages = record.get("stages") or []
        if {stage["name"] for stage in stages} <= USUAL:
            continue
        left, rows = int(record["n"]), []
        whole = max(1, sum(stage["forwards"] + 2 * stage["backwards"] for stage in stages))
        for stage in stages:
            left -= stage["solved"]
            cost = stage["forwards"] + 2 * stage["backwards"]
            rows.append({**stage, "left": left / record["n"], "cost": cost / record["n"], "part": cost / whole})
        tables.append({"record": record, "rows": rows})
    return tables


def _points(curve: Iterable[Sequence[float]], n: int) -> tuple[Point, ...]:
    return tuple(Point(at, f"{at:,.0f}" if at == round(at) else f"{at:.3g}", share, n) for at, share in curve)


def _names(rows: Sequence[Record]) -> list[str]:
    """What each attack is called, with its seed or its threat where the name alone stands for several."""
    seeds = len({row["seed"] for row in rows}) > 1
    names = [f"{row['attack']}, seed {row['seed']}" if seeds else str(row["attack"]) for row in rows]
    return [
        f"{name}, {row['threat']}" if names.count(name) > 1 and row.get("against_eps") else name
        for name, row in zip(names, rows, strict=True)
    ]
