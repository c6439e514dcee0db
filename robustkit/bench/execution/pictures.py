"""Pictures of attacked images, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from robustkit.bench.execution.model_under_test import ModelUnderTest
from robustkit.bench.execution.resolved_case import ResolvedCase
from robustkit.bench.results.picture import Picture
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.data import Data
from robustkit.result import Result

__all__ = ["make_pictures"]

PICTURES = 4  # per case, from its first block


def make_pictures(
    resolved: ResolvedCase,
    model: ModelUnderTest,
    data: Data,
    rows: slice,
    result: Result,
    correct: NDArray[np.bool_],
    universal: UniversalStats | None,
    offset: int,
) -> tuple[Picture, ...]:
    """Pictures of the first images of a block that are correctly classified without an attack.

    For a universal attack, images on which it succeeded come first. There are none for data that are not images with one or
    three channels in [0, 1].

    Args:
        resolved: The case.
        model: The attacked model.
        data: The images of the run.
        rows: The images of the block.
        result: The result of the attack on the block.
        correct: Which images are correctly classified without an attack, (n,).
        universal: The statistics of a universal perturbation; None for other attacks.
        offset: The index of the first image of `data`.
    """
    order, case = np.flatnonzero(correct), resolved.case
    if universal is not None:
        order = np.concatenate([order[result.success.cpu().numpy()[order] == success] for success in (True, False)])
    chosen = order[:PICTURES]
    drawable = len(data.shape) == 4 and data.shape[1] in (1, 3) and resolved.threat.bounds == (0.0, 1.0)
    if not len(chosen) or not drawable:
        return ()
    before, labels = data.images(rows)[chosen], data.y[rows][chosen]
    after = result.x_adv[torch.from_numpy(chosen)].cpu()
    predictions = [model.logits(x, labels, rows.start, "pictures").double().softmax(1).max(1) for x in (before, after)]
    perturbation = None if universal is None or universal.delta is None else universal.delta.numpy()
    return tuple(
        Picture(
            case.model_under_test,
            case.attack,
            case.goal,
            case.threat,
            offset + rows.start + int(i),
            before[k].numpy(),
            after[k].numpy(),
            data.classes[int(labels[k])],
            _class_name(data.classes, int(predictions[0].indices[k])),
            float(predictions[0].values[k]),
            _class_name(data.classes, int(predictions[1].indices[k])),
            float(predictions[1].values[k]),
            float(result.size[i]),
            bool(result.success[i]),
            perturbation,
        )
        for k, i in enumerate(chosen)
    )


def _class_name(names: Sequence[str], index: int) -> str:
    """The name of a class; its index if the model has more classes than the data."""
    return names[index] if index < len(names) else str(index)
