"""Line charts of shares: all positions are computed here, and templates only draw."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from robustkit.bench.plan.plan import model_under_test_name

__all__ = ["Chart", "Label", "Line", "ModelAndDefence", "Point"]

ModelAndDefence = tuple[str, str | None]  # specs; no defence is None

_WIDTH, _LEFT, _RIGHT, _TOP = 388.0, 44.0, 268.0, 14.0  # the drawing and the plot in it, in units of its viewBox
_MIN_PLOT_HEIGHT, _AXIS_HEIGHT = 190.0, 44.0  # minimum height of the plot; height of the axis below it
_ROW_HEIGHT = 13.5  # of a label
_CELL_WIDTH = 6.8  # of a character of normal width
_MAX_ROW_CELLS = 13  # maximum characters in one of the two rows of a label
_MAX_CELLS = 2 * _MAX_ROW_CELLS - 1  # in both rows: a wide character may not fit at the end of the first
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
    """One measured share.

    Attributes:
        eps: The eps; in a chart against cost, the cost per image.
        text: The eps as the user wrote it.
        share: The robust accuracy; at eps 0 the clean accuracy.
        n: Number of images.
        interval: Its 95 % interval, or None.
        all_attacks: Whether all attacks that were run on any model in this norm and data were run at this point.
        is_union: Whether the share is that of the union of attacks; if not, it is the lowest single one.
        flagged: Whether an attack raised a flag at this point.
    """

    eps: float
    text: str
    share: float
    n: int
    interval: tuple[float, float] | None = None
    all_attacks: bool = True
    is_union: bool = True
    flagged: bool = False


@final
@dataclass(frozen=True)
class Line:
    """Points of one model, or of one attack on it, by increasing eps.

    Attributes:
        name: The full name of the model or attack.
        points: Two or more points.
        style: Index of its mark, dashes and colour, from 0.
        main: Whether it is the worst case over attacks, which is drawn thick.
        only: Whether it is the only main line of its chart, which needs no dashes.
        marked: Whether its points have marks.
    """

    name: str
    points: tuple[Point, ...]
    style: int
    main: bool
    only: bool = False
    marked: bool = True

    @property
    def mark(self) -> str:
        """The SVG path of its mark, centred at (0, 0)."""
        return _MARKS[self.style % len(_MARKS)]

    @property
    def dashes(self) -> str:
        """Its stroke-dasharray; only main lines are solid."""
        first = 0 if self.main else 1
        turn = self.style + self.style // len(_MARKS)  # otherwise a mark would always have the same dashes
        return "" if self.only else _DASHES[first + turn % (len(_DASHES) - first)]

    def rises(self) -> list[tuple[Point, Point]]:
        """Pairs of points whose share rises: the lowest at a smaller eps with as many images, and the point itself."""
        pairs = []
        for index, point in enumerate(self.points):
            before = [other for other in self.points[:index] if other.n == point.n and other.eps > 0]
            lowest = min(before, key=lambda other: other.share, default=point)
            if point.share > lowest.share:
                pairs.append((lowest, point))
        return pairs


@final
@dataclass(frozen=True)
class Label:
    """The label of a line in a chart.

    Attributes:
        line: The line.
        rows: One or two rows of text, each with the y of its middle.
        y: The y of the middle of the label.
    """

    line: Line
    rows: tuple[tuple[str, float], ...]
    y: float


@final
@dataclass(frozen=True)
class Chart:
    """Lines with common axes; positions are in units of the drawing, with y downwards.

    Attributes:
        axis: Title of the horizontal axis.
        data: Data spec.
        model_and_defence: Model and defence whose attacks are shown; None where models are compared.
        lines: The lines, in the order of the records.
        max_eps: The largest eps on the axis.
        single_eps_attacks: Names of attacks that were run at one eps only, which have no line.
        stairs: Whether a share holds until the next point, so that the line is drawn as steps.
        logarithmic: Whether the horizontal axis is logarithmic; values up to 1 are at its left end.
    """

    axis: str
    data: str
    model_and_defence: ModelAndDefence | None
    lines: tuple[Line, ...]
    max_eps: float
    single_eps_attacks: tuple[str, ...] = ()
    stairs: bool = False
    logarithmic: bool = False

    width = _WIDTH  # of the drawing
    left = _LEFT  # of the plot
    right = _RIGHT  # of the plot

    @cached_property
    def bottom(self) -> float:
        """The y of a share of 0."""
        return _TOP + max(_MIN_PLOT_HEIGHT, _ROW_HEIGHT * sum(map(len, self._texts)))

    @property
    def height(self) -> float:
        """The height of the drawing."""
        return self.bottom + _AXIS_HEIGHT

    @property
    def description(self) -> str:
        """The figures in one sentence, for screen readers."""
        lines = []
        for line in (line for line in self.lines if line.main):
            ends = (line.points[0], line.points[-1])
            points = ", ".join(f"{100 * point.share:.1f} % at {point.text}" for point in (ends if self.stairs else line.points))
            lines.append(f"{_plain(line.name)}: {points}")
        model = "" if self.model_and_defence is None else f" of {_plain(model_under_test_name(*self.model_and_defence))}"
        return f"Robust accuracy{model} on {_plain(self.data)} against {self.axis}. {'; '.join(lines)}"

    def x(self, eps: float) -> float:
        """The x of an eps."""
        part = math.log(max(eps, 1)) / math.log(max(self.max_eps, 2)) if self.logarithmic else eps / self.max_eps
        return round(_LEFT + (_RIGHT - _LEFT) * part, 2)

    def y(self, share: float) -> float:
        """The y of a share."""
        return round(self.bottom - (self.bottom - _TOP) * share, 2)

    def path(self, line: Line) -> str:
        """The SVG path of a line."""
        positions = [(self.x(point.eps), self.y(point.share)) for point in line.points]
        if self.stairs:
            return f"M{positions[0][0]} {positions[0][1]}" + "".join(f"H{x}V{y}" for x, y in positions[1:])
        return "M" + "L".join(f"{x} {y}" for x, y in positions)

    def ticks(self) -> list[tuple[float, str]]:
        """The x of every eps on the horizontal axis and its text, which is empty where it would overlap another."""
        if self.logarithmic:
            return [(self.x(10**power), f"{10**power:,}") for power in range(math.floor(math.log10(max(self.max_eps, 1))) + 1)]
        texts = {0.0: "0"}
        marked = [line for line in self.lines if line.marked]
        if len(marked) < len(self.lines):
            texts |= {self.max_eps / 2: f"{self.max_eps / 2:.3g}", self.max_eps: f"{self.max_eps:.3g}"}
        for point in (point for line in marked for point in line.points):
            texts.setdefault(point.eps, point.text if len(point.text) <= 8 else f"{point.eps:.3g}")
        texts.setdefault(self.max_eps, f"{self.max_eps:.3g}")  # the axis may be longer than the lines of this model
        taken: list[tuple[float, float]] = []
        shown = {}
        for eps in [0.0, *sorted(texts, reverse=True)[:-1]]:  # the ends first
            half = len(texts[eps]) * _CELL_WIDTH / 2
            low, high = self.x(eps) - half, self.x(eps) + half
            if all(high + _CELL_WIDTH / 2 <= other[0] or low >= other[1] + _CELL_WIDTH / 2 for other in taken):
                taken.append((low, high))
                shown[eps] = texts[eps]
        return [(self.x(eps), shown.get(eps, "")) for eps in sorted(texts)]

    def labels(self) -> list[Label]:
        """The labels at the right end of the lines, from top to bottom, without overlaps."""
        texts = self._texts
        order = sorted(range(len(self.lines)), key=lambda index: -self.lines[index].points[-1].share)
        rows_left, top, labels = sum(map(len, texts)), _TOP - _ROW_HEIGHT / 2, []
        for index in order:
            line, rows = self.lines[index], texts[index]
            ideal = self.y(line.points[-1].share) - _ROW_HEIGHT * len(rows) / 2
            top = max(top, min(ideal, self.bottom + _ROW_HEIGHT / 2 - _ROW_HEIGHT * rows_left))
            heights = tuple(round(top + _ROW_HEIGHT * (row + 0.5), 2) for row in range(len(rows)))
            labels.append(Label(line, tuple(zip(rows, heights, strict=True)), round(top + _ROW_HEIGHT * len(rows) / 2, 2)))
            top, rows_left = top + _ROW_HEIGHT * len(rows), rows_left - len(rows)
        return labels

    @cached_property
    def _texts(self) -> list[tuple[str, ...]]:
        return _rows(_without_common_prefix([line.name for line in self.lines]))

    def rises(self) -> list[tuple[str, Point, Point]]:
        """For each line that rises, its label and the two points of the largest rise."""
        return [
            ("".join(rows), *max(line.rises(), key=lambda pair: pair[1].share - pair[0].share))
            for rows, line in zip(self._texts, self.lines, strict=True)
            if line.rises()
        ]

    def shortened(self) -> list[tuple[str, str]]:
        """The labels that are shortened, each with the full name."""
        labels = [("".join(rows), line.name) for rows, line in zip(self._texts, self.lines, strict=True)]
        return [(label, name) for label, name in labels if label != name]


def _plain(text: str) -> str:
    """The text without control and formatting characters; bytes that are not Unicode are escaped."""
    kinds = {"Cf": "", "Cc": "\N{REPLACEMENT CHARACTER}"}
    valid = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(one if one in "\u200c\u200d" else kinds.get(unicodedata.category(one), one) for one in valid)


def _cells(text: str) -> int:
    """The width of a text in characters of normal width."""
    return sum(
        0 if unicodedata.category(one) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(one) in "WF" else 1
        for one in text
    )


def _without_common_prefix(names: Sequence[str]) -> list[str]:
    """The names without a common file or package prefix, if one of them is too long for a label."""
    prefixes = {name[: name.find(":") + 1] for name in names}
    long = any(_cells(_plain(name)) > _MAX_CELLS for name in names)
    return (
        [name.removeprefix(min(prefixes)) for name in names] if len(names) > 1 and len(prefixes) == 1 and long else list(names)
    )


def _rows(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Labels of one or two rows; long names keep their beginning and end, and equal labels are numbered."""
    labels = [_fit(_plain(name), _MAX_CELLS) for name in names]
    count, seen = Counter(labels), Counter[str]()
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        seen[label] += 1
        if count[label] > 1:
            mark = f" ({seen[label]})"
            labels[index] = _fit(_plain(name), _MAX_CELLS - len(mark)) + mark
    return [_split(label) for label in labels]


def _fit(text: str, cells: int) -> str:
    """The text, or its beginning, … and its end where it is too long."""
    start, end = text[: cells // 2], text[len(text) - min(len(text), cells // 2) :]
    if _cells(text) <= cells:
        return text
    while _cells(start) + _cells(end) + 1 > cells:
        start, end = (start[:-1], end) if _cells(start) >= _cells(end) else (start, end[1:])
    return f"{start}…{end}"


def _split(text: str) -> tuple[str, ...]:
    """The text in one or two rows; it is broken after a sign or a space where the rest then fits."""
    if _cells(text) <= _MAX_ROW_CELLS:
        return (text,)
    cuts = [cut for cut in range(1, len(text)) if _cells(text[:cut]) <= _MAX_ROW_CELLS]
    good = [cut for cut in cuts if not text[cut - 1].isalnum() and _cells(text[cut:]) <= _MAX_ROW_CELLS]
    cut = (good or cuts)[-1]
    return text[:cut], text[cut:]
