"""Tests of paired binary outcomes, and their adjustment for multiple testing."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest

__all__ = ["holm", "mcnemar"]


def mcnemar(only_a: int, only_b: int) -> float:
    """The p value of McNemar's exact two-sided test (McNemar 1947): the two proportions are equal.

    Args:
        only_a: Number of images that are right in A and wrong in B.
        only_b: Number of images that are right in B and wrong in A.

    Returns:
        p in [0, 1]; 1 where no pair is discordant.
    """
    return float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p: Sequence[float]) -> tuple[float, ...]:
    """Adjust p values for multiple testing (Holm 1979): rejecting adjusted p <= 0.05 keeps the family-wise error <= 5 %."""
    adjusted, running_max = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        running_max = max(running_max, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = running_max
    return tuple(adjusted)
