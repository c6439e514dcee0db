"""How long a run will still take: each case costs what its blocks have cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

__all__ = ["Forecast"]


@final
class Forecast:
    """What is known of the costs of a run.

    Images of one case cost about the same, images of different cases anything: one step or a thousand. So the images that
    are left are counted by case, each at the price of that case. What goes by beside the blocks (writing, waiting) is counted
    by the image over all cases.

    Args:
        images: How many images each case has.
        workers: How many blocks are done at a time.
    """

    def __init__(self, images: Sequence[int], workers: int = 1) -> None:
        self._left = list(images)
        self._seconds = [0.0] * len(images)
        self._timed = [0] * len(images)
        self._workers = workers
        self._watched: tuple[float, float] | None = None  # when the first block that was done now ended, and the last one
        self._work, self._done = 0.0, 0  # of those since the first one

    def add(self, case: int, images: int, seconds: float, at: float | None = None) -> None:
        """A block is there.

        Args:
            case: Of which case.
            images: How many it has.
            seconds: How long it took, now or in an earlier run.
            at: The time by the clock if it was done just now.
        """
        self._left[case] -= images
        self._timed[case] += images
        self._seconds[case] += seconds
        if at is not None and self._watched is None:
            self._watched = (at, at)
        elif at is not None and self._watched is not None:
            self._watched = (self._watched[0], at)
            self._work += seconds
            self._done += images

    def left(self) -> float | None:
        """Seconds to go; None as long as there is a case of which nothing has been done."""
        if any(left and not timed for left, timed in zip(self._left, self._timed, strict=True)):
            return None
        each = zip(self._left, self._seconds, self._timed, strict=True)
        work = sum(left * seconds / timed for left, seconds, timed in each if left)
        return (work + sum(self._left) * self._beside()) / self._workers

    def _beside(self) -> float:
        """Seconds of a worker that go by with an image, without being spent on it."""
        if self._watched is None or not self._done:
            return 0.0
        first, last = self._watched
        return max(0.0, (last - first) * self._workers - self._work) / self._done
