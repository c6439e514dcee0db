"""Robust accuracy against eps: from the records of a run to charts in which every position is known; templates draw them."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from robustkit.bench.specs import number
from robustkit.errors import ArgumentError

__all__ = ["Chart", "Family", "Label", "Line", "Point", "families"]

Record = Mapping[str, Any]  # one record of results.json
_Subject = tuple[str, str | None]  # model and defence
_Place = tuple[str, str]  # data and norm
_Spots = dict[float, list[Record]]  # by increasing eps

_UNTARGETED = "misclassify"
# Balls of these grow with eps, so that robustness cannot rise with it; what the horizontal axis is called.
_AXES = {"linf": "eps (linf)", "l2": "eps (l2)", "l1": "eps (l1)", "pixels": "pixels that may change"}
_WIDTH, _LEFT, _RIGHT, _TOP = 388.0, 44.0, 268.0, 14.0  # of a drawing and of the plot in it, in units of its viewBox
_TALL, _BELOW = 190.0, 44.0  # the plot is at least so tall; room for the axis
_STEP = 13.5  # from one row of a label to the next
_CELL = 6.8  # room for one character
_CELLS = 13  # characters in one of the two rows of a label, at most
_ROOM = 2 * _CELLS - 1  # in both: one less than they hold, as a wide character may not fit at the end of the first
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "4 2", "1.5 4")
_MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.5-3.5h7v7h-7z",
    "M0-4.6L4.4 3.4h-8.8z",
    "M0-5L5 0L0 5L-5 0z",
    "M0 4.6L4.4-3.4h-8.8z",
    "M-1.4-4.4h2.8v3h3v2.8h-3v3h-2.8v-3h-3v-2.8h3z",
)


@final
@dataclass(frozen=True)
class Point:
    """One measured share at one eps.

    Attributes:
        eps: As a number.
        written: As the user wrote it.
        share: Of the images that stay right; at eps 0 the clean accuracy.
        n: How many images it is of.
        interval: Its 95 % interval, or None.
        whole: Whether every attack that any model was under in the same norm, on the same data, was run there.
        joint: Whether it is of all attacks together that were run there; if not, the lowest of them stands in.
        flagged: Whether an attack raised a flag there.
    """

    eps: float
    written: str
    share: float
    n: int
    interval: tuple[float, float] | None = None
    whole: bool = True
    joint: bool = True
    flagged: bool = False


@final
@dataclass(frozen=True)
class Line:
    """Points of one model, or of one attack on it, by increasing eps.

    Attributes:
        name: What it is of, in full.
        points: Two or more.
        style: Which mark, dashes and colour it has, counted from 0.
        main: Whether it is of all attacks together, and so drawn as the figure and not beside it.
        only: Whether it is the only such line of its chart, and so needs no dashes.
    """

    name: str
    points: tuple[Point, ...]
    style: int
    main: bool
    only: bool = False

    @property
    def mark(self) -> str:
        """The path of its mark, around (0, 0)."""
        return _MARKS[self.style % len(_MARKS)]

    @property
    def dashes(self) -> str:
        """Its stroke-dasharray; lines beside the figure are never solid."""
        first = 0 if self.main else 1
        turn = self.style + self.style // len(_MARKS)  # or a mark would always come with the same dashes
        return "" if self.only else _DASHES[first + turn % (len(_DASHES) - first)]

    def rises(self) -> list[tuple[Point, Point]]:
        """Points with more than was measured at a smaller eps of as many images, each after the lowest of these."""
        found = []
        for place, point in enumerate(self.points):
            before = [other for other in self.points[:place] if other.n == point.n and other.eps > 0]
            lowest = min(before, key=lambda other: other.share, default=point)
            if point.share > lowest.share:
                found.append((lowest, point))
        return found


@final
@dataclass(frozen=True)
class Label:
    """The name of a line as it stands in a chart.

    Attributes:
        line: Whose name it is.
        rows: One or two rows of text, each with the height of its middle.
        y: The height of its middle.
    """

    line: Line
    rows: tuple[tuple[str, float], ...]
    y: float


@final
@dataclass(frozen=True)
class Chart:
    """Lines with common axes; positions are in units of the drawing, y downwards.

    Attributes:
        norm: Of the threats.
        data: What was attacked.
        subject: Model and defence whose attacks are shown one by one, or None where models are compared.
        lines: In the order of the records.
        widest: The largest eps on the axis.
        once: Names of attacks that were run at one eps only, and so have no line.
    """

    norm: str
    data: str
    subject: _Subject | None
    lines: tuple[Line, ...]
    widest: float
    once: tuple[str, ...] = ()

    width = _WIDTH  # of every drawing
    left = _LEFT  # where its plot begins
    right = _RIGHT  # and ends

    @cached_property
    def bottom(self) -> float:
        """Where a share of 0 is."""
        return _TOP + max(_TALL, _STEP * sum(map(len, self._texts)))

    @property
    def height(self) -> float:
        """Of the drawing."""
        return self.bottom + _BELOW

    @property
    def axis(self) -> str:
        """What the horizontal axis is called."""
        return _AXES[self.norm]

    @property
    def told(self) -> str:
        """The figures in one sentence, for who does not see the drawing."""
        lines = []
        for line in (line for line in self.lines if line.main):
            points = ", ".join(f"{100 * point.share:.1f} % at {point.written}" for point in line.points)
            lines.append(f"{_plain(line.name)}: {points}")
        subject = "" if self.subject is None else f" of {_plain(_subject_name(self.subject))}"
        return f"Robust accuracy{subject} on {_plain(self.data)} against {self.axis}. {'; '.join(lines)}"

    def x(self, eps: float) -> float:
        """Where that eps is."""
        return round(_LEFT + (_RIGHT - _LEFT) * eps / self.widest, 2)

    def y(self, share: float) -> float:
        """Where that share is."""
        return round(self.bottom - (self.bottom - _TOP) * share, 2)

    def path(self, line: Line) -> str:
        """The path of a line."""
        return "M" + "L".join(f"{self.x(point.eps)} {self.y(point.share)}" for point in line.points)

    def ticks(self) -> list[tuple[float, str]]:
        """Every eps on the horizontal axis, and its text as the user wrote it, or "" where there is no room for one."""
        texts = {0.0: "0"}
        for point in (point for line in self.lines for point in line.points):
            texts.setdefault(point.eps, point.written if len(point.written) <= 8 else f"{point.eps:.3g}")
        taken: list[tuple[float, float]] = []
        shown = {}
        for eps in [0.0, *sorted(texts, reverse=True)[:-1]]:  # the ends first
            half = len(texts[eps]) * _CELL / 2
            low, high = self.x(eps) - half, self.x(eps) + half
            if all(high + _CELL / 2 <= other[0] or low >= other[1] + _CELL / 2 for other in taken):
                taken.append((low, high))
                shown[eps] = texts[eps]
        return [(self.x(eps), shown.get(eps, "")) for eps in sorted(texts)]

    def labels(self) -> list[Label]:
        """What stands at the right of each line, from the top down, none over another."""
        texts = self._texts
        order = sorted(range(len(self.lines)), key=lambda place: -self.lines[place].points[-1].share)
        left, top, found = sum(map(len, texts)), _TOP - _STEP / 2, []
        for place in order:
            line, rows = self.lines[place], texts[place]
            wanted = self.y(line.points[-1].share) - _STEP * len(rows) / 2
            top = max(top, min(wanted, self.bottom + _STEP / 2 - _STEP * left))
            heights = tuple(round(top + _STEP * (row + 0.5), 2) for row in range(len(rows)))
            found.append(Label(line, tuple(zip(rows, heights, strict=True)), round(top + _STEP * len(rows) / 2, 2)))
            top, left = top + _STEP * len(rows), left - len(rows)
        return found

    @cached_property
    def _texts(self) -> list[tuple[str, ...]]:
        return _rows(_apart([line.name for line in self.lines]))

    def rises(self) -> list[tuple[str, Point, Point]]:
        """For each line that rises its label, and the two points between which it rises most."""
        return [
            ("".join(rows), *max(line.rises(), key=lambda pair: pair[1].share - pair[0].share))
            for rows, line in zip(self._texts, self.lines, strict=True)
            if line.rises()
        ]

    def shortened(self) -> list[tuple[str, str]]:
        """Labels that are not the whole name, and the name."""
        labels = [("".join(rows), line.name) for rows, line in zip(self._texts, self.lines, strict=True)]
        return [(label, name) for label, name in labels if label != name]


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
    together: dict[tuple[Any, ...], Record] = {_key(row): row for row in results.get("together", ())}
    names = _names(results["records"])
    found = []
    for (data, norm), subjects in _places(results["records"]).items():
        lines = {subject: _main(spots, together, subjects) for subject, spots in subjects.items()}
        widest = max(eps for spots in subjects.values() for eps in spots)
        charts = []
        if len(subjects) > 1:
            every = tuple(
                Line(_subject_name(subject), lines[subject], style, main=True) for style, subject in enumerate(subjects)
            )
            charts.append(Chart(norm, data, None, every, widest))
        for style, (subject, spots) in enumerate(subjects.items()):
            alone, once = _alone(spots, lines[subject], style, names)
            if len(subjects) == 1 or len(alone) > 1:
                charts.append(Chart(norm, data, subject, alone, widest, once))
        found.append(Family(norm, data, tuple(charts)))
    return found


def _subject_name(subject: _Subject) -> str:
    """A model, and the defence that it stands behind."""
    model, defence = subject
    return model if defence is None else f"{model} behind {defence}"


def _key(row: Record) -> tuple[Any, ...]:
    return row["model"], row["data"], row["defence"], row["threat"]


def _eps(threat: str) -> tuple[str, float] | None:
    """Norm and eps of a threat, or None where it has no place on an axis."""
    norm, _, text = threat.partition(":")
    try:
        eps = number(text, "eps")
    except ArgumentError:
        return None
    return (norm, eps) if norm in _AXES and eps > 0 else None


def _places(records: Iterable[Record]) -> dict[_Place, dict[_Subject, _Spots]]:
    """The records by data and norm, model and defence, and eps; without what is too little for a curve."""
    places: dict[_Place, dict[_Subject, _Spots]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in records:
        read = _eps(record["threat"])
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


def _main(spots: _Spots, together: Mapping[tuple[Any, ...], Record], subjects: Mapping[_Subject, _Spots]) -> tuple[Point, ...]:
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


def _alone(spots: _Spots, main: tuple[Point, ...], style: int,
           names: Mapping[tuple[str, int], str]) -> tuple[tuple[Line, ...], tuple[str, ...]]:  # fmt: skip
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


def _plain(text: str) -> str:
    """The text without what steers a screen: what is no Unicode is written out, marks of direction go, controls show."""
    kinds = {"Cf": "", "Cc": "\N{REPLACEMENT CHARACTER}"}
    kept = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(one if one in "\u200c\u200d" else kinds.get(unicodedata.category(one), one) for one in kept)


def _cells(text: str) -> int:
    """How wide a text is, in usual characters."""
    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def _apart(names: Sequence[str]) -> list[str]:
    """The names without the file or package that all of them come from, where one is too long for a label."""
    begins = {name[: name.find(":") + 1] for name in names}
    long = any(_cells(_plain(name)) > _ROOM for name in names)
    return [name.removeprefix(min(begins)) for name in names] if len(names) > 1 and len(begins) == 1 and long else list(names)


def _rows(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Labels of one or two rows, from the begin and the end of long names; those that come out equal are numbered."""
    labels = [_fit(_plain(name), _ROOM) for name in names]
    often, seen = Counter(labels), Counter[str]()
    for place, (name, label) in enumerate(zip(names, labels, strict=True)):
        seen[label] += 1
        if often[label] > 1:
            mark = f" ({seen[label]})"
            labels[place] = _fit(_plain(name), _ROOM - len(mark)) + mark
    return [_split(label) for label in labels]


def _fit(text: str, cells: int) -> str:
    """The begin of a text, … and its end, where it is too long."""
    begin, end = text[: cells // 2], text[len(text) - min(len(text), cells // 2) :]
    if _cells(text) <= cells:
        return text
    while _cells(begin) + _cells(end) + 1 > cells:
        begin, end = (begin[:-1], end) if _cells(begin) >= _cells(end) else (begin, end[1:])
    return f"{begin}…{end}"


def _split(text: str) -> tuple[str, ...]:
    """The text in one row or two; the break comes after a sign or a space if there is one that leaves room for the rest."""
    if _cells(text) <= _CELLS:
        return (text,)
    cuts = [cut for cut in range(1, len(text)) if _cells(text[:cut]) <= _CELLS]
    good = [cut for cut in cuts if not text[cut - 1].isalnum() and _cells(text[cut:]) <= _CELLS]
    cut = (good or cuts)[-1]
    return text[:cut], text[cut:]
