"""A dry run: what a plan would cost, measured on a few images of each case."""

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

CLEAN_SECONDS = 0.1  # attack as many images as the model classifies in this time: few beside the run, enough to extrapolate
MIN_IMAGES = 4


@final
@dataclass(frozen=True)
class Preview:
    """The expected cost of one case.

    Attributes:
        case: The case.
        images: Its number of images.
        tried: How many of them were attacked for the estimate.
        forwards: Expected forward passes, over all images.
        backwards: Expected backward passes, over all images.
        seconds: Expected time of one worker, in seconds.
        width: The largest possible width of the 95 % interval of robust accuracy for this number of images.
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
        """Half the width: how far the interval reaches to either side at a robust accuracy of 50 %."""
        return self.width / 2

    @property
    def detectable_difference(self) -> float | None:
        """The smallest difference between two models that a paired comparison on these images detects with 80 % power.

        The two models are assumed to differ on 10 % of the images, or on as many as the difference needs. None if there are
        too few images for any difference.
        """
        return minimum_detectable_difference(self.images)

    @property
    def images_for_half(self) -> int | None:
        """The number of images that it takes to detect half of that difference."""
        return None if self.detectable_difference is None else sample_size(self.detectable_difference / 2)


def preview(loaded: LoadedRun) -> list[Preview]:
    """Attack a few images of each case and extrapolate.

    As many as the model classifies in a tenth of a second, at least 4 and at most a block.
    """
    return [_preview_case(loaded, index) for index in range(len(loaded.cases))]


def _preview_case(loaded: LoadedRun, index: int) -> Preview:
    images, case = loaded.images(index), loaded.cases[index].case
    n = len(images)
    count = min(
        n, loaded.plan.block, max(MIN_IMAGES, math.floor(CLEAN_SECONDS / loaded.seconds_per_image(case.model_under_test)))
    )
    block = loaded.measure(Task(index, images.start, images.start + count, "preview"))
    training = block.universal.learned if block.universal is not None else None  # a cost that does not grow with the images
    low, high = wilson(n // 2, n)  # widest at a proportion of 1/2
    factor = n / count
    return Preview(
        case,
        n,
        count,
        round(int(block.result.forwards.sum()) * factor) + (training["forwards"] if training else 0),
        round(int(block.result.backwards.sum()) * factor) + (training["backwards"] if training else 0),
        block.seconds * factor + (training["seconds"] if training else 0.0),
        high - low,
    )
