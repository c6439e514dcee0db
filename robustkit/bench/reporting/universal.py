"""Universal perturbations in the report: fooling rates on each model, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from robustkit.bench.plan.plan import Case
from robustkit.bench.reporting.images import png, signed
from robustkit.bench.results.picture import Picture

__all__ = ["perturbations"]

Record = Mapping[str, Any]


def perturbations(records: Sequence[Record], pictures: Sequence[Picture], side: int) -> dict[str, Any] | None:
    """The models on which the perturbations were evaluated, and one row per perturbation; None without a universal attack.

    Args:
        records: The records of results.json.
        pictures: Attacked images; one of each universal attack has its perturbation.
        side: The longer side of a drawn perturbation, in CSS pixels.
    """
    universal = [record for record in records if record.get("fooling_held_out") is not None]
    if not universal:
        return None
    models = dict.fromkeys(map(_model_under_test, universal))
    for record in universal:
        models |= dict.fromkeys(record.get("transfer") or {})
    return {"models": list(models), "rows": [_row(record, models, pictures, side) for record in universal]}


def _row(record: Record, models: Mapping[str, None], pictures: Sequence[Picture], side: int) -> dict[str, Any]:
    fooling = dict(record.get("transfer") or {}) | {_model_under_test(record): record["fooling_held_out"]}
    key = _model_under_test(record), *(record[name] for name in ("threat", "goal", "attack"))
    matching = (
        one for one in pictures if (one.model, one.threat, one.goal, one.attack) == key and one.perturbation is not None
    )
    picture = next(matching, None)
    shares = [fooling.get(model) for model in models]
    return {"record": record, "model": _model_under_test(record), "fooling": shares, "drawn": _draw(picture, side)}


def _model_under_test(record: Record) -> str:
    return Case.from_record(record).model_under_test


def _draw(picture: Picture | None, side: int) -> dict[str, Any] | None:
    if picture is None or picture.perturbation is None or picture.perturbation.shape != picture.clean.shape:
        return None
    drawn, scale = signed(picture.perturbation.astype(np.float64))
    height, width = drawn.shape[1:]
    zoom = max(1, side // max(height, width))
    return {"png": png(drawn), "scale": f"{scale:g}", "width": width * zoom, "height": height * zoom}
