"""Charts of shares against something: every position is known here, templates only draw."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

__all__ = ["Chart", "Label", "Line", "Point", "Subject", "subject_name"]

Subject = tuple[str, str | None]  # model and defence

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
        marked: Whether its points are drawn, and not the line alone.
    """

    name: str
    points: tuple[Point, ...]
    style: int
    main: bool
    only: bool = False
    marked: bool = True

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
        axis: What the horizontal axis is called.
        data: What was attacked.
        subject: Model and defence whose attacks are shown one by one, or None where models are compared.
        lines: In the order of the records.
        widest: The largest eps on the axis.
        once: Names of attacks that were run at one eps only, and so have no line.
        stairs: Whether a share holds until the next point, and not merely there.
        logarithmic: Whether each tenfold takes the same room on the horizontal axis; all up to 1 stands at its begin.
    """

    axis: str
    data: str
    subject: Subject | None
    lines: tuple[Line, ...]
    widest: float
    once: tuple[str, ...] = ()
    stairs: bool = False
    logarithmic: bool = False

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
    def told(self) -> str:
        """The figures in one sentence, for who does not see the drawing."""
        lines = []
        for line in (line for line in self.lines if line.main):
            ends = (line.points[0], line.points[-1])
            points = ", ".join(
                f"{100 * point.share:.1f} % at {point.written}" for point in (ends if self.stairs else line.points)
            )
            lines.append(f"{_plain(line.name)}: {points}")
        subject = "" if self.subject is None else f" of {_plain(subject_name(self.subject))}"
        return f"Robust accuracy{subject} on {_plain(self.data)} against {self.axis}. {'; '.join(lines)}"

    def x(self, eps: float) -> float:
        """Where that eps is."""
        part = math.log(max(eps, 1)) / math.log(max(self.widest, 2)) if self.logarithmic else eps / self.widest
        return round(_LEFT + (_RIGHT - _LEFT) * part, 2)

    def y(self, share: float) -> float:
        """Where that share is."""
        return round(self.bottom - (self.bottom - _TOP) * share, 2)

    def path(self, line: Line) -> str:
        """The path of a line."""
        places = [(self.x(point.eps), self.y(point.share)) for point in line.points]
        if self.stairs:
            return f"M{places[0][0]} {places[0][1]}" + "".join(f"H{x}V{y}" for x, y in places[1:])
        return "M" + "L".join(f"{x} {y}" for x, y in places)

    def ticks(self) -> list[tuple[float, str]]:
        """Every eps on the horizontal axis, and its text as the user wrote it, or "" where there is no room for one."""
        if self.logarithmic:
            return [(self.x(10**power), f"{10**power:,}") for power in range(math.floor(math.log10(max(self.widest, 1))) + 1)]
        texts = {0.0: "0"}
        marked = [line for line in self.lines if line.marked]
        if len(marked) < len(self.lines):
            texts |= {self.widest / 2: f"{self.widest / 2:.3g}", self.widest: f"{self.widest:.3g}"}
        for point in (point for line in marked for point in line.points):
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


def subject_name(subject: Subject) -> str:
    """A model, and the defence that it stands behind."""
    model, defence = subject
    return model if defence is None else f"{model} behind {defence}"


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
