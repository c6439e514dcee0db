"""What a plan would take: measured on a few images, before hours are spent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from robustkit.bench.execution.loaded_run import LoadedRun
from robustkit.bench.plan.plan import Case
from robustkit.bench.results.block import Task
from robustkit.bench.statistics.intervals import wilson
from robustkit.bench.statistics.power import minimum_detectable_difference, sample_size

__all__ = ["Preview", "preview"]

GLANCE = 0.1  # seconds of clean images: what is tried must be small beside the run, and not so small that it misleads
LEAST = 4


@final
@dataclass(frozen=True)
class Preview:
    """What one case would take.

    Attributes:
        case: Which.
        images: How many it has.
        tried: How many of them were attacked to know the rest.
        forwards: To expect, over all images.
        backwards: To expect, likewise.
        seconds: To expect, of one worker.
        width: The widest that the 95 % interval of robust accuracy can become with so many images.
    """

    case: Case
    images: int
    tried: int
    forwards: int
    backwards: int
    seconds: float
    width: float

    @property
    def half_width(self) -> float:
        """Half of that: how far the interval reaches to either side where half of the images stay right."""
        return self.width / 2

    @property
    def finds(self) -> float | None:
        """The smallest difference of two models that a comparison on so many images finds with a chance of 80 %.

        One image in ten is assumed to be decided otherwise by the two, or as many as the difference needs. None where there
        are too few images for any.
        """
        return minimum_detectable_difference(self.images)

    @property
    def half_needs(self) -> int | None:
        """How many images it takes to find half of that difference."""
        return None if self.finds is None else sample_size(self.finds / 2)


def preview(loaded: LoadedRun) -> list[Preview]:
    """Attack as many images of each case as its model reads in a tenth of a second, at least 4, and extrapolate."""
    return [_tried(loaded, index) for index in range(len(loaded.trials))]


def _tried(loaded: LoadedRun, index: int) -> Preview:
    images, case = loaded.images(index), loaded.trials[index].case
    n = len(images)
    count = min(n, loaded.plan.block, max(LEAST, math.floor(GLANCE / loaded.glance(case.subject))))
    block = loaded.measure(Task(index, images.start, images.start + count, "preview"))
    once = block.spread.learned if block.spread is not None else None  # what does not grow with the images
    low, high = wilson(n // 2, n)  # a share of one half has the widest interval
    share = n / count
    return Preview(
        case,
        n,
        count,
        round(int(block.result.forwards.sum()) * share) + (once["forwards"] if once else 0),
        round(int(block.result.backwards.sum()) * share) + (once["backwards"] if once else 0),
        block.seconds * share + (once["seconds"] if once else 0.0),
        high - low,
    )
