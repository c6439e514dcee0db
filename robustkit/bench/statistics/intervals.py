"""95 % score intervals: of one proportion, and of the difference of two paired proportions."""

from __future__ import annotations

from math import sqrt
from typing import Final

from scipy.stats import binomtest

__all__ = ["tango", "wilson"]

_Z: Final = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
_BISECTIONS: Final = 60


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927; computed by scipy).

    It covers the sampling of the images only, not a stronger attack: a robust accuracy is an upper bound on robustness.

    Returns:
        Lower and upper end, in [0, 1].
    """
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def tango(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of the difference B - A of two paired proportions (Tango 1998, Stat. Med. 17:891).

    It inverts the asymptotic form of McNemar's test, so it depends on the discordant pairs and n alone. Its coverage holds
    even with few discordant pairs, as between two versions of one model. McNemar's exact test is stricter: its p can exceed
    0.05 where the interval just excludes 0.

    Args:
        only_a: Number of images that are right in A and wrong in B.
        only_b: Number of images that are right in B and wrong in A.
        n: Number of images.

    Returns:
        Lower and upper end, in [-1, 1].
    """
    return 0.0 - _upper_limit(only_a, only_b, n), _upper_limit(only_b, only_a, n)  # 0.0 - x avoids -0.0


def _upper_limit(more: int, fewer: int, n: int) -> float:
    """Upper limit of Tango's interval of (more - fewer) / n, by bisection between the estimate and 1."""
    inside, outside = (more - fewer) / n, 1.0
    for _ in range(_BISECTIONS):
        delta = (inside + outside) / 2
        linear = more + fewer - (2 * n - more + fewer) * delta
        # Maximum-likelihood estimate of the probability of `fewer` under the constraint that the difference is delta.
        share = (sqrt(max(0.0, linear**2 + 8 * n * fewer * delta * (1 - delta))) + linear) / (4 * n)
        variance = n * (2 * share + delta * (1 - delta))
        if (more - fewer - n * delta) ** 2 <= _Z**2 * variance:
            inside = delta
        else:
            outside = delta
    return inside
