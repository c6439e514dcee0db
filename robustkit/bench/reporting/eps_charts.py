"""Charts of robust accuracy against eps, one point per threat of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from robustkit.bench.plan.plan import UNTARGETED, model_under_test_name
from robustkit.bench.plan.specs import number
from robustkit.bench.reporting.chart import Chart, Line, ModelAndDefence, Point
from robustkit.errors import ArgumentError

__all__ = ["AXES", "Family", "families", "measured_point", "norm_and_eps"]

Record = Mapping[str, Any]  # one record of results.json
_Axes = tuple[str, str]  # data and norm
_ByEps = dict[float, list[Record]]  # by increasing eps

# Norms whose balls grow with eps, so that robust accuracy cannot rise; the title of the horizontal axis.
AXES = {"linf": "eps (linf)", "l2": "eps (l2)", "l1": "eps (l1)", "pixels": "number of pixels"}


@final
@dataclass(frozen=True)
class Family:
    """The charts of one norm and data set, with equal axes: one of all models where there are several, then one per model.

    Attributes:
        norm: The norm of the threats.
        data: Data spec.
        charts: One or more charts.
    """

    norm: str
    data: str
    charts: tuple[Chart, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """The points of the worst case over attacks, in all charts."""
        return tuple(point for chart in self.charts for line in chart.lines if line.main for point in line.points)


def families(results: Mapping[str, Any]) -> list[Family]:
    """The charts of a run, for each model that was attacked at two or more eps of one norm.

    An eps needs an attack with the goal misclassify, because robust accuracy under other goals is high by definition;
    attacks with other goals count in the worst case over attacks.

    Args:
        results: The content of results.json.
    """
    worst_case: dict[tuple[Any, ...], Record] = {_key(row): row for row in results.get("worst_case", ())}
    names = _names(results["records"])
    families = []
    for (data, norm), models in _by_axes(results["records"]).items():
        lines = {model: _worst_case_points(by_eps, worst_case, models) for model, by_eps in models.items()}
        max_eps = max(eps for by_eps in models.values() for eps in by_eps)
        charts = []
        if len(models) > 1:
            every = tuple(
                Line(model_under_test_name(*model), lines[model], style, main=True) for style, model in enumerate(models)
            )
            charts.append(Chart(AXES[norm], data, None, every, max_eps))
        for style, (model, by_eps) in enumerate(models.items()):
            of_model, single_eps_attacks = _lines_of_model(by_eps, lines[model], style, names)
            if len(models) == 1 or len(of_model) > 1:
                charts.append(Chart(AXES[norm], data, model, of_model, max_eps, single_eps_attacks))
        families.append(Family(norm, data, tuple(charts)))
    return families


def _key(row: Record) -> tuple[Any, ...]:
    return row["model"], row["data"], row["defence"], row["threat"]


def norm_and_eps(threat: str) -> tuple[str, float] | None:
    """The norm and the eps of a threat spec, or None where it has none."""
    norm, _, text = threat.partition(":")
    try:
        eps = number(text, "eps")
    except ArgumentError:
        return None
    return (norm, eps) if norm in AXES and eps > 0 else None


def _by_axes(records: Iterable[Record]) -> dict[_Axes, dict[ModelAndDefence, _ByEps]]:
    """The records by data and norm, by model and defence, and by eps; without those of a single eps."""
    groups: dict[_Axes, dict[ModelAndDefence, _ByEps]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        norm_eps = norm_and_eps(record["threat"])
        if norm_eps is not None:
            norm, eps = norm_eps
            groups[record["data"], norm][record["model"], record["defence"]][eps].append(record)
    curves = {}
    for axes, models in groups.items():
        untargeted = {
            model: {eps: rows for eps, rows in sorted(by_eps.items()) if _untargeted(rows)} for model, by_eps in models.items()
        }
        with_curve = {model: by_eps for model, by_eps in untargeted.items() if len(by_eps) > 1}
        if with_curve:
            curves[axes] = with_curve
    return curves


def _untargeted(rows: Iterable[Record]) -> list[Record]:
    return [row for row in rows if row["goal"] == UNTARGETED]


def _attacks(rows: Iterable[Record]) -> set[tuple[str, str]]:
    return {(row["attack"], row["goal"]) for row in rows}


def _worst_case_points(
    by_eps: _ByEps, worst_case: Mapping[tuple[Any, ...], Record], models: Mapping[ModelAndDefence, _ByEps]
) -> tuple[Point, ...]:
    """The clean accuracy, then the worst case over attacks at each eps."""
    every = {attack for others in models.values() for rows in others.values() for attack in _attacks(rows)}
    clean = min((row for rows in by_eps.values() for row in _untargeted(rows)), key=lambda row: float(row["clean_accuracy"]))
    points = [Point(0.0, "0", float(clean["clean_accuracy"]), int(clean["n"]))]
    for eps, rows in by_eps.items():
        union = [worst_case[key] for key in dict.fromkeys(map(_key, rows)) if key in worst_case]
        points.append(
            measured_point(
                eps,
                min(union or _untargeted(rows), key=_robust),
                all_attacks=_attacks(rows) == every,
                is_union=bool(union) or len(rows) == 1,
                flagged=any(row["flags"] for row in _untargeted(rows)),
            )
        )
    return tuple(points)


def _robust(row: Record) -> float:
    return float(row["robust_accuracy"])


def measured_point(eps: float, row: Record, *, all_attacks: bool = True, is_union: bool = True, flagged: bool = False) -> Point:
    """The robust accuracy of a record, or of a worst case, at its eps; the options are attributes of `Point`."""
    text = str(row["threat"]).partition(":")[2].strip()
    interval = float(row["low"]), float(row["high"])
    return Point(eps, text, _robust(row), int(row["n"]), interval, all_attacks, is_union, flagged)


def _names(records: Iterable[Record]) -> dict[tuple[str, int], str]:
    """The name of each attack, with its seed where there are several; the order determines its style."""
    attacks = dict.fromkeys((record["attack"], record["seed"]) for record in records)
    several = len({seed for _, seed in attacks}) > 1
    return {(attack, seed): f"{attack}, seed {seed}" if several else attack for attack, seed in attacks}


def _lines_of_model(
    by_eps: _ByEps, main: tuple[Point, ...], style: int, names: Mapping[tuple[str, int], str]
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """The lines of one model: the worst case, then each attack with two or more eps; and the names of the other attacks."""
    lines: dict[tuple[str, int], dict[float, Record]] = defaultdict(dict)
    for eps, rows in by_eps.items():
        for row in sorted(_untargeted(rows), key=_robust):
            lines[row["attack"], row["seed"]].setdefault(eps, row)
    if len(lines) == 1 and len({attack for rows in by_eps.values() for attack in _attacks(rows)}) == 1:
        return (Line(names[next(iter(lines))], main, style, main=True, only=True),), ()
    thin = [
        Line(name, tuple(measured_point(eps, row) for eps, row in lines[key].items()), style_of_attack, main=False)
        for style_of_attack, (key, name) in enumerate(names.items())
        if len(lines.get(key, ())) > 1
    ]
    single_eps_attacks = tuple(name for key, name in names.items() if len(lines.get(key, ())) == 1)
    return (Line("worst case", main, style, main=True, only=True), *thin), single_eps_attacks
