"""Shows a run as one self-contained HTML page: data in, string out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from robustkit.bench.plan.plan import Case
from robustkit.bench.reporting.curve_charts import cost_charts, eps_charts, stage_tables
from robustkit.bench.reporting.eps_charts import families
from robustkit.bench.reporting.images import png, signed, to_bytes
from robustkit.bench.reporting.universal import perturbations
from robustkit.bench.results.picture import Picture

__all__ = ["render", "report", "summary"]

Record = Mapping[str, Any]  # one record of results.json: strings, numbers, and lists of {name, why}

_NONE = "–"
_CONCERNED = ("model", "defence", "attack", "goal")  # by a flag
_UNTARGETED = "misclassify"  # the one goal under which robust accuracy is the figure
_MOST = 96  # pictures on a page, as long as each attack can have one
_SIDE = 96  # CSS pixels of a picture's longer side, at most; three of them fit a phone


def report(results: Mapping[str, Any], pictures: Sequence[Picture], *, command: str) -> str:
    """The page that shows a run: the answer, curves, the table, flags, pictures, and how to repeat it.

    The page loads nothing, runs no script, and depends on the arguments alone: equal arguments give equal bytes.
    A row is called lowest among the rows of one model, data, defence and threat that differ, and only where the goal is
    that the model be wrong: robust accuracy under any other goal is high by definition and says nothing about robustness.

    Args:
        results: The content of results.json.
        pictures: Attacked images; shown by model, threat, goal and attack, in the order of the records.
        command: The command line that repeats the run, shown as it is.

    Returns:
        One HTML document, to be written as UTF-8.
    """
    shown = summary(results)
    context = {
        "version": results["robustkit"],
        "records": results["records"],
        "worst_case": _together(results),
        "curves": families(results),
        "eps_charts": eps_charts(results["records"]),
        "cost_charts": cost_charts(results["records"]),
        "stages": stage_tables(results["records"]),
        "begun": any(stage["name"] == "starts" for record in results["records"] for stage in record.get("stages", ())),
        "flag_numbers": {flag: number for number, flag in enumerate(shown["flags"], start=1)},
        "gallery": _gallery(results["records"], pictures),
        "universal": perturbations(results["records"], pictures, _SIDE),
        "sources": _sources(results),
        "environment": results["environment"],
        "command": command,
    }
    return render("report.html", shown | context)


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What every way to show a run is made of: the answer, the rows strongest first, which are lowest, and the flags.

    A row is lowest only where another one of its group is higher: a mark on every row would say nothing.

    Args:
        results: The content of results.json.
    """
    records: Sequence[Record] = results["records"]
    plain = [record for record in records if record["goal"] == _UNTARGETED]
    other = [record for record in records if record["goal"] != _UNTARGETED]
    return {
        "verdicts": _verdicts(records, _together(results)),
        "threats": list(dict.fromkeys(str(record["threat"]) for record in records)),
        "untargeted": [(group, sorted(rows, key=lambda row: float(row["robust_accuracy"]))) for group, rows in _groups(plain)],
        "targeted": [(group, sorted(rows, key=lambda row: -float(row["success_rate"]))) for group, rows in _groups(other)],
        "lowest": {group: _lowest(rows) if _differ(rows) else None for group, rows in _groups(plain)},
        "seeds": {record["seed"] for record in records},
        "flags": _flags(records),
    }


def render(template: str, context: Mapping[str, Any]) -> str:
    """The template with that context, every text in it escaped; it can be written as UTF-8."""
    page = _environment().get_template(template).render(context)
    # A file name that is no Unicode holds lone surrogates, and these cannot be written as UTF-8.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


@cache  # reading the templates takes longer than filling them, and a run writes its page after every case
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # names of models, classes and files are not to be trusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "size": _size, "count": _count, "seconds": _seconds}
    return environment


@final
@dataclass(frozen=True)
class _Group:
    """Rows that may be compared: one thing attacked, one threat."""

    model: str
    data: str
    defence: str | None
    threat: str


def _groups(records: Iterable[Record]) -> list[tuple[_Group, list[Record]]]:
    """The records by what may be compared, models kept together, all in order of first appearance."""
    groups: dict[_Group, list[Record]] = defaultdict(list)
    first: dict[tuple[str, str, str | None], int] = {}
    for record in records:
        group = _Group(record["model"], record["data"], record["defence"], record["threat"])
        groups[group].append(record)
        first.setdefault((group.model, group.data, group.defence), len(first))
    return sorted(groups.items(), key=lambda item: first[item[0].model, item[0].data, item[0].defence])


def _lowest(rows: Iterable[Record]) -> float:
    return min(float(row["robust_accuracy"]) for row in rows)


def _differ(rows: Iterable[Record]) -> bool:
    return len({float(row["robust_accuracy"]) for row in rows}) > 1


def _verdicts(records: Iterable[Record], together: Mapping[_Group, Record]) -> list[dict[str, Any]]:
    """One answer a model: clean accuracy (a range where the rows differ), then the figure of each threat.

    That is the share of images that survive all attacks together, where the results hold it, else the lowest of them.
    """
    subjects: dict[tuple[str, str, str | None], list[tuple[_Group, list[Record]]]] = defaultdict(list)
    for group, rows in _groups(records):
        subjects[group.model, group.data, group.defence].append((group, rows))
    return [
        {
            "group": found[0][0],
            "clean": _span([float(row["clean_accuracy"]) for _, rows in found for row in rows]),
            "images": sorted({int(row["n"]) for _, rows in found for row in rows}),
            "threats": [{"threat": group.threat, **_answer(rows, together.get(group))} for group, rows in found],
        }
        for found in subjects.values()
    ]


def _together(results: Mapping[str, Any]) -> dict[_Group, Record]:
    """What survives all attacks together, by what was attacked."""
    rows = results.get("worst_case", ())
    return {_Group(row["model"], row["data"], row["defence"], row["threat"]): row for row in rows}


def _answer(rows: Iterable[Record], together: Record | None) -> dict[str, Any]:
    """The robust accuracy, or None where no attack tried to make the model be wrong; and whether it is flagged."""
    plain = [row for row in rows if row["goal"] == _UNTARGETED]
    if not plain:
        return {"robust": None, "flagged": False}
    figure = min(plain, key=lambda row: float(row["robust_accuracy"])) if together is None else together
    flagged = any(row["flags"] for row in plain)
    return {"robust": figure["robust_accuracy"], "low": figure["low"], "high": figure["high"], "flagged": flagged}


def _span(values: Sequence[float]) -> str:
    low, high = _percent(min(values)), _percent(max(values))
    return high if low == high else f"{low} to {high}"


def _flags(records: Iterable[Record]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Each alarm told once, with what it concerns: model and defence, attack and goal, and the threats of these."""
    flags: dict[tuple[str, str], dict[tuple[Any, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, why in dict.fromkeys((flag["name"], flag["why"]) for flag in record["flags"]):
            threats = flags[name, why][tuple(record[key] for key in _CONCERNED)]
            if record["threat"] not in threats:
                threats.append(record["threat"])
    return {
        flag: [dict(zip(_CONCERNED, key, strict=True)) | {"threats": threats} for key, threats in rows.items()]
        for flag, rows in flags.items()
    }


def _sources(results: Mapping[str, Any]) -> dict[str, str]:
    """Which images and which weights, as far as the records say it: what a name alone does not hold to."""
    found = {}
    for record in results["records"]:
        images = f"{record['n']:,} image{'' if record['n'] == 1 else 's'}"
        offset = int(results.get("data", {}).get("offset") or 0)
        found[record["data"]] = f"{images}{f' after the first {offset:,}' if offset else ''}{_hash(record.get('data_hash'))}"
    for record in results["records"]:
        if record.get("model_hash"):
            found.setdefault(record["model"], _hash(record["model_hash"]).removeprefix(", "))
    return found


def _hash(value: str | None) -> str:
    return f", hash {value}" if value else ""


def _gallery(records: Iterable[Record], pictures: Iterable[Picture]) -> list[dict[str, Any]]:
    """The pictures by model, threat, goal and attack, in the order of the table; strays come last.

    Each shows as many as keep the page within some `_MOST` of them, and at least one.
    """
    shown: dict[tuple[str, str, str, str], list[Picture]] = {
        (Case.of(record).subject, record["threat"], record["goal"], record["attack"]): []
        for record in sorted(records, key=lambda record: bool(record["goal"] != _UNTARGETED))
    }
    for picture in pictures:
        shown.setdefault((picture.model, picture.threat, picture.goal, picture.attack), []).append(picture)
    albums = {key: some for key, some in shown.items() if some}
    most = max(1, _MOST // max(1, len(albums)))
    names = ("model", "threat", "goal", "attack")
    return [
        {**dict(zip(names, key, strict=True)), "panels": [_panel(picture) for picture in some[:most]]}
        for key, some in albums.items()
    ]


def _panel(picture: Picture) -> dict[str, Any]:
    """What the template shows of one picture."""
    change, scale = signed(picture.adversarial.astype(np.float64) - picture.clean.astype(np.float64))
    height, width = picture.clean.shape[1:]
    longer = max(height, width)
    zoom = _SIDE // longer if longer <= _SIDE else _SIDE / longer  # whole pixels where the picture is enlarged
    return {
        "picture": picture,
        "clean": png(to_bytes(picture.clean)),
        "change": png(change),
        "adversarial": png(to_bytes(picture.adversarial)),
        "scale": f"{scale:g}" if scale else None,
        "width": max(1, round(width * zoom)),
        "height": max(1, round(height * zoom)),
        "enlarged": zoom >= 1,
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _size(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return _NONE
    return f"{value:,.0f}" if value == round(value) or value >= 100 else f"{value:#.3g}"


def _count(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0") if value < 100 else f"{value:,.0f}"


def _seconds(value: float) -> str:
    if value < 0.1:
        return "<\N{NO-BREAK SPACE}0.1\N{NO-BREAK SPACE}s"
    return f"{value:,.1f}\N{NO-BREAK SPACE}s" if value < 100 else f"{value:,.0f}\N{NO-BREAK SPACE}s"
