"""How long a run will still take: each case costs what its blocks have cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

__all__ = ["Forecast"]


@final
class Forecast:
    """What is known of the costs of a run.

    Images of one case cost about the same, images of different cases anything: one step or a thousand. So the images that
    are left are counted by case, each at the price of that case.

    Args:
        images: How many images each case has.
        workers: How many blocks are done at a time.
    """

    def __init__(self, images: Sequence[int], workers: int = 1) -> None:
        self._left = list(images)
        self._seconds = [0.0] * len(images)
        self._timed = [0] * len(images)
        self._workers = workers

    def add(self, case: int, images: int, seconds: float) -> None:
        """A block of a case is there: so many images, which took so long, now or in an earlier run."""
        self._left[case] -= images
        self._timed[case] += images
        self._seconds[case] += seconds

    def left(self) -> float | None:
        """Seconds to go; None as long as there is a case of which nothing has been done."""
        if any(left and not timed for left, timed in zip(self._left, self._timed, strict=True)):
            return None
        each = zip(self._left, self._seconds, self._timed, strict=True)
        return sum(left * seconds / timed for left, seconds, timed in each if left) / self._workers
