"""The paired test that decides whether two attacks are equally strong."""

from __future__ import annotations

from scipy.stats import binomtest

__all__ = ["LEVEL", "mcnemar_p_value"]

LEVEL = 0.001  # significance level: below this p-value, two attacks differ in strength


def mcnemar_p_value(only_ours: int, only_theirs: int) -> float:
    """The p-value of McNemar's exact two-sided test (McNemar 1947) that both attacks succeed equally often.

    Args:
        only_ours: Number of examples that only our attack solves.
        only_theirs: Number of examples that only the other attack solves.

    Returns:
        p in [0, 1]; 1 if there is no such example.
    """
    discordant = only_ours + only_theirs
    return float(binomtest(only_ours, discordant).pvalue) if discordant else 1.0
