"""Robust accuracy against eps: from the records of a run to charts in which every position is known; templates draw them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from robustkit.bench.plan.specs import number
from robustkit.bench.reporting.chart import Chart, Line, Point, Subject, subject_name
from robustkit.errors import ArgumentError

__all__ = ["AXES", "Family", "families", "place_of"]

Record = Mapping[str, Any]  # one record of results.json
_Place = tuple[str, str]  # data and norm
_Spots = dict[float, list[Record]]  # by increasing eps

_UNTARGETED = "misclassify"
# Balls of these grow with eps, so that robustness cannot rise with it; what the horizontal axis is called.
AXES = {"linf": "eps (linf)", "l2": "eps (l2)", "l1": "eps (l1)", "pixels": "pixels that may change"}


@final
@dataclass(frozen=True)
class Family:
    """Charts of one norm and one data set, which have the same axes: all models first where there are several, then each.

    Attributes:
        norm: Of the threats.
        data: What was attacked.
        charts: One or more.
    """

    norm: str
    data: str
    charts: tuple[Chart, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """Those of all attacks together, in all charts."""
        return tuple(point for chart in self.charts for line in chart.lines if line.main for point in line.points)


def families(results: Mapping[str, Any]) -> list[Family]:
    """The charts of a run: for each model that was attacked under two eps of one norm or more.

    An eps counts only where an attack wanted the model to be wrong, as robust accuracy under other goals is high by
    definition; attacks with another goal are part of what all attacks together leave.

    Args:
        results: The content of results.json.
    """
    together: dict[tuple[Any, ...], Record] = {_key(row): row for row in results.get("worst_case", ())}
    names = _names(results["records"])
    found = []
    for (data, norm), subjects in _places(results["records"]).items():
        lines = {subject: _main(spots, together, subjects) for subject, spots in subjects.items()}
        widest = max(eps for spots in subjects.values() for eps in spots)
        charts = []
        if len(subjects) > 1:
            every = tuple(
                Line(subject_name(subject), lines[subject], style, main=True) for style, subject in enumerate(subjects)
            )
            charts.append(Chart(AXES[norm], data, None, every, widest))
        for style, (subject, spots) in enumerate(subjects.items()):
            alone, once = _alone(spots, lines[subject], style, names)
            if len(subjects) == 1 or len(alone) > 1:
                charts.append(Chart(AXES[norm], data, subject, alone, widest, once))
        found.append(Family(norm, data, tuple(charts)))
    return found


def _key(row: Record) -> tuple[Any, ...]:
    return row["model"], row["data"], row["defence"], row["threat"]


def place_of(threat: str) -> tuple[str, float] | None:
    """Norm and eps of a threat, or None where it has no place on an axis."""
    norm, _, text = threat.partition(":")
    try:
        eps = number(text, "eps")
    except ArgumentError:
        return None
    return (norm, eps) if norm in AXES and eps > 0 else None


def _places(records: Iterable[Record]) -> dict[_Place, dict[Subject, _Spots]]:
    """The records by data and norm, model and defence, and eps; without what is too little for a curve."""
    places: dict[_Place, dict[Subject, _Spots]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        read = place_of(record["threat"])
        if read is not None:
            norm, eps = read
            places[record["data"], norm][record["model"], record["defence"]][eps].append(record)
    kept = {}
    for place, subjects in places.items():
        enough = {
            subject: {eps: rows for eps, rows in sorted(spots.items()) if _plain_rows(rows)}
            for subject, spots in subjects.items()
        }
        enough = {subject: spots for subject, spots in enough.items() if len(spots) > 1}
        if enough:
            kept[place] = enough
    return kept


def _plain_rows(rows: Iterable[Record]) -> list[Record]:
    return [row for row in rows if row["goal"] == _UNTARGETED]


def _attacks(rows: Iterable[Record]) -> set[tuple[str, str]]:
    return {(row["attack"], row["goal"]) for row in rows}


def _main(spots: _Spots, together: Mapping[tuple[Any, ...], Record], subjects: Mapping[Subject, _Spots]) -> tuple[Point, ...]:
    """All attacks together: the clean accuracy, then each eps."""
    every = {attack for others in subjects.values() for rows in others.values() for attack in _attacks(rows)}
    clean = min((row for rows in spots.values() for row in _plain_rows(rows)), key=lambda row: float(row["clean_accuracy"]))
    points = [Point(0.0, "0", float(clean["clean_accuracy"]), int(clean["n"]))]
    for eps, rows in spots.items():
        joint = [together[key] for key in dict.fromkeys(map(_key, rows)) if key in together]
        points.append(
            _point(
                eps,
                min(joint or _plain_rows(rows), key=_robust),
                whole=_attacks(rows) == every,
                joint=bool(joint) or len(rows) == 1,
                flagged=any(row["flags"] for row in _plain_rows(rows)),
            )
        )
    return tuple(points)


def _robust(row: Record) -> float:
    return float(row["robust_accuracy"])


def _point(eps: float, row: Record, *, whole: bool = True, joint: bool = True, flagged: bool = False) -> Point:
    written = str(row["threat"]).partition(":")[2].strip()
    interval = float(row["low"]), float(row["high"])
    return Point(eps, written, _robust(row), int(row["n"]), interval, whole, joint, flagged)


def _names(records: Iterable[Record]) -> dict[tuple[str, int], str]:
    """What each attack is called, with its seed where there are several; in an order that gives it its style."""
    found = dict.fromkeys((record["attack"], record["seed"]) for record in records)
    several = len({seed for _, seed in found}) > 1
    return {(attack, seed): f"{attack}, seed {seed}" if several else attack for attack, seed in found}


def _alone(
    spots: _Spots, main: tuple[Point, ...], style: int, names: Mapping[tuple[str, int], str]
) -> tuple[tuple[Line, ...], tuple[str, ...]]:
    """The lines of one model: all attacks together, then those that were run at two eps or more; and what the others are."""
    lines: dict[tuple[str, int], dict[float, Record]] = defaultdict(dict)
    for eps, rows in spots.items():
        for row in sorted(_plain_rows(rows), key=_robust):
            lines[row["attack"], row["seed"]].setdefault(eps, row)
    if len(lines) == 1 and len({attack for rows in spots.values() for attack in _attacks(rows)}) == 1:
        return (Line(names[next(iter(lines))], main, style, main=True, only=True),), ()
    thin = [
        Line(name, tuple(_point(eps, row) for eps, row in lines[key].items()), place, main=False)
        for place, (key, name) in enumerate(names.items())
        if len(lines.get(key, ())) > 1
    ]
    once = tuple(name for key, name in names.items() if len(lines.get(key, ())) == 1)
    return (Line("all together", main, style, main=True, only=True), *thin), once
