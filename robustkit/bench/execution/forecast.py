"""The remaining time of a run, extrapolated from the blocks that are done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

__all__ = ["Forecast"]


@final
class Forecast:
    """Estimates the remaining time of a run.

    Images of one case cost about the same; images of different cases may differ by a factor of a thousand. So remaining images
    are counted by case, at the mean time per image of that case. Overhead outside the blocks (writing, waiting) is estimated
    per image, over all cases.

    Args:
        images: The number of images of each case.
        workers: The number of blocks that run at a time.
    """

    def __init__(self, images: Sequence[int], workers: int = 1) -> None:
        self._remaining = list(images)
        self._seconds = [0.0] * len(images)
        self._finished = [0] * len(images)
        self._workers = workers
        self._interval: tuple[float, float] | None = None  # when the first and the last block of this session ended
        self._work, self._images = 0.0, 0  # seconds and images of the blocks of this session, without the first

    def add(self, case: int, images: int, seconds: float, at: float | None = None) -> None:
        """Record a finished block.

        Args:
            case: The index of its case.
            images: Its number of images.
            seconds: How long it took, in this session or an earlier one.
            at: The clock time at which it ended, if it was computed in this session.
        """
        self._remaining[case] -= images
        self._finished[case] += images
        self._seconds[case] += seconds
        if at is not None and self._interval is None:
            self._interval = (at, at)
        elif at is not None and self._interval is not None:
            self._interval = (self._interval[0], at)
            self._work += seconds
            self._images += images

    def seconds_left(self) -> float | None:
        """The remaining time in seconds; None while some case has no finished block."""
        if any(remaining and not finished for remaining, finished in zip(self._remaining, self._finished, strict=True)):
            return None
        cases = zip(self._remaining, self._seconds, self._finished, strict=True)
        work = sum(remaining * seconds / finished for remaining, seconds, finished in cases if remaining)
        return (work + sum(self._remaining) * self._overhead()) / self._workers

    def _overhead(self) -> float:
        """Seconds per image that a worker spends outside of blocks."""
        if self._interval is None or not self._images:
            return 0.0
        first, last = self._interval
        return max(0.0, (last - first) * self._workers - self._work) / self._images
