"""How many images a run needs: what a paired comparison of two models would find, counted before anything is run."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy.stats import binom

__all__ = ["DISCORDANT", "POWER", "images_for", "power", "smallest_difference"]

LEVEL: Final = 0.05
POWER: Final = 0.8
DISCORDANT: Final = 0.1  # the share of images that two models decide otherwise, unless a larger difference needs more of them
_MOST: Final = 10_000_000  # images
_TAIL: Final = 1e-9  # of how many images differ, left out at either end


def power(n: int, difference: float, discordant: float = DISCORDANT) -> float:
    """The chance that McNemar's exact two-sided test on n images finds a difference at the level of 5 %.

    Args:
        n: How many images, each decided by both models.
        difference: The true difference of the two robust accuracies, in [0, 1].
        discordant: The share of images that one model gets right and the other wrong; at least the difference.
    """
    discordant = min(1.0, max(discordant, difference))
    differing = np.arange(int(binom.ppf(_TAIL, n, discordant)), int(binom.isf(_TAIL, n, discordant)) + 1)
    share = 0.5 * (1 + difference / discordant)  # of those that differ, that the better model gets right
    # The smallest count of its wins that is rejected at either end; where there is none it is beyond all of them.
    wins = differing - binom.ppf(LEVEL / 2, differing, 0.5)
    wins += 2 * binom.sf(wins - 1, differing, 0.5) > LEVEL
    found = binom.sf(wins - 1, differing, share) + binom.cdf(differing - wins, differing, share)
    return float((binom.pmf(differing, n, discordant) * np.where(wins > differing, 0.0, found)).sum())


def smallest_difference(n: int, discordant: float = DISCORDANT) -> float | None:
    """The smallest difference that is found on n images with a chance of 80 %, in [0, 1]; None where none is."""
    if power(n, 1.0, discordant) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, middle, discordant) >= POWER else (middle, high)
    return high


def images_for(difference: float, discordant: float = DISCORDANT) -> int:
    """How many images are needed to find a difference with a chance of 80 %."""
    low, high = 1, 2
    while power(high, difference, discordant) < POWER and high < _MOST:
        low, high = high, 2 * high
    while high - low > max(1, high // 1000):  # the power is a saw: a closer figure would mean nothing
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, discordant) >= POWER else (middle, high)
    return high
