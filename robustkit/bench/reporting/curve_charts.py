"""Charts of the curves of single records, against cost and against eps, and tables of the stages of an attack."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robustkit.bench.plan.plan import UNTARGETED
from robustkit.bench.reporting.chart import Chart, Line, ModelAndDefence, Point
from robustkit.bench.reporting.eps_charts import AXES, measured_point, norm_and_eps

__all__ = ["COMMON_STAGES", "cost_charts", "minimum_norm_charts", "stage_tables"]

Record = Mapping[str, Any]  # one record of results.json

COMMON_STAGES = frozenset({"clean", "attack", "learning"})  # stages of every attack


def cost_charts(records: Iterable[Record]) -> list[tuple[str, Chart]]:
    """For each model and threat, the threat spec and the robust accuracy of its attacks against the cost per image."""
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
        max_cost = max(point.eps for line in lines for point in line.points)
        axis = "forwards + 2 × backwards, per image"
        charts.append((threat, Chart(axis, data, (model, defence), lines, max_cost, stairs=True, logarithmic=True)))
    return charts


def minimum_norm_charts(records: Sequence[Record]) -> list[Chart]:
    """For each model with a curve against eps from one run: its curves, and the other attacks at their eps."""
    groups: dict[tuple[ModelAndDefence, str, str], list[Record]] = defaultdict(list)
    for record in records:
        norm_eps = norm_and_eps(record["threat"])
        if norm_eps is not None and record["goal"] == UNTARGETED:
            groups[(record["model"], record["defence"]), record["data"], norm_eps[0]].append(record)
    charts = []
    for (model, data, norm), rows in groups.items():
        with_curve = [row for row in rows if row.get("against_eps")]
        others = [row for row in rows if not row.get("against_eps")]
        if with_curve:
            charts.append(_minimum_norm_chart(model, data, norm, with_curve, others))
    return charts


def _minimum_norm_chart(
    model: ModelAndDefence, data: str, norm: str, with_curve: Sequence[Record], others: Sequence[Record]
) -> Chart:
    names = _names([*with_curve, *others])
    lines = [
        Line(name, _points(row["against_eps"], row["n"]), style, main=True, only=len(with_curve) == 1, marked=False)
        for style, (name, row) in enumerate(zip(names, with_curve, strict=False))
    ]
    max_eps = max(point.eps for line in lines for point in line.points)
    points_of: dict[str, list[Point]] = defaultdict(list)
    for name, row in zip(names[len(with_curve) :], others, strict=True):
        norm_eps = norm_and_eps(row["threat"])
        if norm_eps is not None and norm_eps[1] <= max_eps:
            points_of[name].append(measured_point(norm_eps[1], row))
    dots = [
        Line(name, tuple(sorted(points, key=lambda point: point.eps)), len(lines) + style, main=False)
        for style, (name, points) in enumerate(points_of.items())
    ]
    return Chart(AXES[norm], data, model, (*lines, *dots), max_eps, stairs=True)


def stage_tables(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The stages of each attack that has its own: examples solved, share still unsolved, and cost per image."""
    tables = []
    for record in records:
        stages = record.get("stages") or []
        if {stage["name"] for stage in stages} <= COMMON_STAGES:
            continue
        unsolved, rows = int(record["n"]), []
        total = max(1, sum(stage["forwards"] + 2 * stage["backwards"] for stage in stages))
        for stage in stages:
            unsolved -= stage["solved"]
            cost = stage["forwards"] + 2 * stage["backwards"]
            rows.append({**stage, "unsolved": unsolved / record["n"], "cost": cost / record["n"], "part": cost / total})
        tables.append({"record": record, "rows": rows})
    return tables


def _points(curve: Iterable[Sequence[float]], n: int) -> tuple[Point, ...]:
    return tuple(Point(at, f"{at:,.0f}" if at == round(at) else f"{at:.3g}", share, n) for at, share in curve)


def _names(rows: Sequence[Record]) -> list[str]:
    """The name of each attack, with its seed or its threat where the name alone is ambiguous."""
    seeds = len({row["seed"] for row in rows}) > 1
    names = [f"{row['attack']}, seed {row['seed']}" if seeds else str(row["attack"]) for row in rows]
    return [
        f"{name}, {row['threat']}" if names.count(name) > 1 and row.get("against_eps") else name
        for name, row in zip(names, rows, strict=True)
    ]
