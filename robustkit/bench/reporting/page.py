"""The report of a run: one self-contained HTML page."""

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

from robustkit.bench.plan.plan import UNTARGETED, Case
from robustkit.bench.reporting.curve_charts import cost_charts, minimum_norm_charts, stage_tables
from robustkit.bench.reporting.eps_charts import families
from robustkit.bench.reporting.images import png, signed, to_bytes
from robustkit.bench.reporting.universal import perturbations
from robustkit.bench.results.picture import Picture

__all__ = ["render", "report", "summary"]

Record = Mapping[str, Any]  # one record of results.json: strings, numbers, and lists of {name, why}

_NONE = "–"
_CASE = ("model", "defence", "attack", "goal")  # the cases that a flag concerns
_MAX_PICTURES = 96  # on a page, unless there are more attacks; each attack has at least one
_SIDE = 96  # longer side of a picture in CSS pixels; three fit on a phone


def report(results: Mapping[str, Any], pictures: Sequence[Picture], *, command: str) -> str:
    """The HTML page of a run: robust accuracies, curves, tables, flags, pictures, and how to reproduce the run.

    The page loads nothing, runs no script, and depends on the arguments alone: equal arguments give equal bytes. The lowest
    robust accuracy of one model, data, defence and threat is marked, and only for the goal misclassify: robust accuracy
    under any other goal is high by definition and says nothing about robustness.

    Args:
        results: The content of results.json.
        pictures: Attacked images; shown by model, threat, goal and attack, in the order of the records.
        command: The command line that reproduces the run.

    Returns:
        One HTML document, to be written as UTF-8.
    """
    shown = summary(results)
    context = {
        "version": results["robustkit"],
        "records": results["records"],
        "worst_case": _worst_case(results),
        "curves": families(results),
        "minimum_norm_charts": minimum_norm_charts(results["records"]),
        "cost_charts": cost_charts(results["records"]),
        "stages": stage_tables(results["records"]),
        "warm_started": any(stage["name"] == "starts" for record in results["records"] for stage in record.get("stages", ())),
        "flag_numbers": {flag: number for number, flag in enumerate(shown["flags"], start=1)},
        "gallery": _gallery(results["records"], pictures),
        "universal": perturbations(results["records"], pictures, _SIDE),
        "sources": _sources(results),
        "environment": results["environment"],
        "command": command,
    }
    return render("report.html", shown | context)


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """What every view of a run shows: the robust accuracies, the records with the strongest attack first, and the flags.

    The lowest robust accuracy of a group is marked only if another one is higher.

    Args:
        results: The content of results.json.
    """
    records: Sequence[Record] = results["records"]
    untargeted = [record for record in records if record["goal"] == UNTARGETED]
    targeted = [record for record in records if record["goal"] != UNTARGETED]
    return {
        "verdicts": _verdicts(records, _worst_case(results)),
        "threats": list(dict.fromkeys(str(record["threat"]) for record in records)),
        "untargeted": [
            (group, sorted(rows, key=lambda row: float(row["robust_accuracy"]))) for group, rows in _groups(untargeted)
        ],
        "targeted": [(group, sorted(rows, key=lambda row: -float(row["success_rate"]))) for group, rows in _groups(targeted)],
        "lowest": {group: _lowest(rows) if _differ(rows) else None for group, rows in _groups(untargeted)},
        "seeds": {record["seed"] for record in records},
        "flags": _flags(records),
    }


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render a template; all text is escaped, and the result can be encoded as UTF-8."""
    page = _environment().get_template(template).render(context)
    # A file name that is not Unicode contains lone surrogates, which UTF-8 cannot encode.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


@cache  # parsing the templates takes longer than rendering, and a run writes its page after every case
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # names of models, classes and files are untrusted
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "size": _size, "count": _count, "seconds": _seconds}
    return environment


@final
@dataclass(frozen=True)
class _Group:
    """What comparable records have in common: the model, its defence, the data and the threat."""

    model: str
    data: str
    defence: str | None
    threat: str


def _groups(records: Iterable[Record]) -> list[tuple[_Group, list[Record]]]:
    """The comparable records; groups of one model are adjacent, in the order of first appearance."""
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


def _verdicts(records: Iterable[Record], worst_case: Mapping[_Group, Record]) -> list[dict[str, Any]]:
    """For each model its clean accuracy, as a range where records differ, and its robust accuracy under each threat.

    That is the robust accuracy under the union of all attacks, or the lowest one where the results lack the union.
    """
    models: dict[tuple[str, str, str | None], list[tuple[_Group, list[Record]]]] = defaultdict(list)
    for group, rows in _groups(records):
        models[group.model, group.data, group.defence].append((group, rows))
    return [
        {
            "group": groups[0][0],
            "clean": _span([float(row["clean_accuracy"]) for _, rows in groups for row in rows]),
            "images": sorted({int(row["n"]) for _, rows in groups for row in rows}),
            "threats": [{"threat": group.threat, **_robust_accuracy(rows, worst_case.get(group))} for group, rows in groups],
        }
        for groups in models.values()
    ]


def _worst_case(results: Mapping[str, Any]) -> dict[_Group, Record]:
    """The worst case over attacks of each group."""
    rows = results.get("worst_case", ())
    return {_Group(row["model"], row["data"], row["defence"], row["threat"]): row for row in rows}


def _robust_accuracy(rows: Iterable[Record], worst_case: Record | None) -> dict[str, Any]:
    """The robust accuracy, or None without an attack of goal misclassify; and whether it is flagged."""
    untargeted = [row for row in rows if row["goal"] == UNTARGETED]
    if not untargeted:
        return {"robust": None, "flagged": False}
    figure = min(untargeted, key=lambda row: float(row["robust_accuracy"])) if worst_case is None else worst_case
    flagged = any(row["flags"] for row in untargeted)
    return {"robust": figure["robust_accuracy"], "low": figure["low"], "high": figure["high"], "flagged": flagged}


def _span(values: Sequence[float]) -> str:
    low, high = _percent(min(values)), _percent(max(values))
    return high if low == high else f"{low} to {high}"


def _flags(records: Iterable[Record]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Each flag once, with the cases that it concerns: model, defence, attack, goal, and their threats."""
    flags: dict[tuple[str, str], dict[tuple[Any, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for name, why in dict.fromkeys((flag["name"], flag["why"]) for flag in record["flags"]):
            threats = flags[name, why][tuple(record[key] for key in _CASE)]
            if record["threat"] not in threats:
                threats.append(record["threat"])
    return {
        flag: [dict(zip(_CASE, key, strict=True)) | {"threats": threats} for key, threats in rows.items()]
        for flag, rows in flags.items()
    }


def _sources(results: Mapping[str, Any]) -> dict[str, str]:
    """The images and the weights by name, with their hashes where the records have them."""
    sources = {}
    for record in results["records"]:
        images = f"{record['n']:,} image{'' if record['n'] == 1 else 's'}"
        offset = int(results.get("data", {}).get("offset") or 0)
        sources[record["data"]] = f"{images}{f' after the first {offset:,}' if offset else ''}{_hash(record.get('data_hash'))}"
    for record in results["records"]:
        if record.get("model_hash"):
            sources.setdefault(record["model"], _hash(record["model_hash"]).removeprefix(", "))
    return sources


def _hash(value: str | None) -> str:
    return f", hash {value}" if value else ""


def _gallery(records: Iterable[Record], pictures: Iterable[Picture]) -> list[dict[str, Any]]:
    """The pictures by model, threat, goal and attack, in the order of the table; those without a record are last.

    Each attack shows equally many, at most `_MAX_PICTURES` in all, and at least one.
    """
    pictures_of: dict[tuple[str, str, str, str], list[Picture]] = {
        (Case.from_record(record).model_under_test, record["threat"], record["goal"], record["attack"]): []
        for record in sorted(records, key=lambda record: bool(record["goal"] != UNTARGETED))
    }
    for picture in pictures:
        pictures_of.setdefault((picture.model, picture.threat, picture.goal, picture.attack), []).append(picture)
    albums = {key: album for key, album in pictures_of.items() if album}
    per_album = max(1, _MAX_PICTURES // max(1, len(albums)))
    names = ("model", "threat", "goal", "attack")
    return [
        {**dict(zip(names, key, strict=True)), "panels": [_panel(picture) for picture in album[:per_album]]}
        for key, album in albums.items()
    ]


def _panel(picture: Picture) -> dict[str, Any]:
    """The values that the template shows of one picture."""
    perturbation, scale = signed(picture.adversarial.astype(np.float64) - picture.clean.astype(np.float64))
    height, width = picture.clean.shape[1:]
    longer = max(height, width)
    zoom = _SIDE // longer if longer <= _SIDE else _SIDE / longer  # an integer factor where the picture is enlarged
    return {
        "picture": picture,
        "clean": png(to_bytes(picture.clean)),
        "perturbation": png(perturbation),
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
