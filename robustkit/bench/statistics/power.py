"""Power and sample size of a paired comparison of two models, computed before a run."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy.stats import binom

__all__ = ["DISCORDANT", "POWER", "minimum_detectable_difference", "power", "sample_size"]

LEVEL: Final = 0.05
POWER: Final = 0.8
DISCORDANT: Final = 0.1  # default share of discordant images (right under one model, wrong under the other)
_MAX_IMAGES: Final = 10_000_000
_TAIL: Final = 1e-9  # probability left out at either end of the number of discordant images


def power(n: int, difference: float, discordant: float = DISCORDANT) -> float:
    """The power of McNemar's exact two-sided test at the 5 % level on n images.

    Args:
        n: Number of images, each classified by both models.
        difference: True difference of the two robust accuracies, in [0, 1].
        discordant: Share of images that one model gets right and the other wrong, in [0, 1]; raised to `difference` if below.

    Returns:
        The probability that the test rejects, in [0, 1].
    """
    discordant = min(1.0, max(discordant, difference))
    differing = np.arange(int(binom.ppf(_TAIL, n, discordant)), int(binom.isf(_TAIL, n, discordant)) + 1)
    share = 0.5 * (1 + difference / discordant)  # of discordant images that the better model gets right
    # The smallest number of wins at which the test rejects; above `differing` where it never rejects.
    wins = differing - binom.ppf(LEVEL / 2, differing, 0.5)
    wins += 2 * binom.sf(wins - 1, differing, 0.5) > LEVEL
    rejected = binom.sf(wins - 1, differing, share) + binom.cdf(differing - wins, differing, share)
    return float((binom.pmf(differing, n, discordant) * np.where(wins > differing, 0.0, rejected)).sum())


def minimum_detectable_difference(n: int, discordant: float = DISCORDANT) -> float | None:
    """The smallest difference that the test detects on n images with 80 % power, in (0, 1]; None where no difference is."""
    if power(n, 1.0, discordant) < POWER:
        return None
    low, high = 0.0, 1.0
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, middle, discordant) >= POWER else (middle, high)
    return high


def sample_size(difference: float, discordant: float = DISCORDANT) -> int:
    """The number of images that the test needs to detect a difference with 80 % power, to 0.1 %."""
    low, high = 1, 2
    while power(high, difference, discordant) < POWER and high < _MAX_IMAGES:
        low, high = high, 2 * high
    while high - low > max(1, high // 1000):  # power is a sawtooth in n, so more precision would mean nothing
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, difference, discordant) >= POWER else (middle, high)
    return high
