"""Sweeps: cases that differ in eps alone. A block starts from the block of the same images under the next smaller eps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, final

from robustkit.bench.execution.resolved_case import ResolvedCase

__all__ = ["Sweeps"]


@final
class Sweeps:
    """The sweeps of a plan; cases are given by their index.

    Args:
        cases: The cases of the plan.
    """

    def __init__(self, cases: Sequence[ResolvedCase]) -> None:
        self._cases = cases

    def key(self, case: int) -> tuple[Any, ...]:
        """What the cases of a sweep have in common; universal attacks learn from scratch, so each is a sweep of its own."""
        resolved = self._cases[case]
        if resolved.is_universal:
            return (case,)
        names = resolved.case
        return names.model_under_test, names.attack, names.goal, type(resolved.threat), resolved.threat.bounds

    def rank(self, case: int) -> tuple[float, str]:
        """Sorts the cases of a sweep: by eps, and by spec if two specs mean the same eps."""
        resolved = self._cases[case]
        return float(resolved.threat.eps), resolved.case.threat

    def lower(self, case: int) -> int | None:
        """The case of the same sweep with the next smaller eps; None if there is none."""
        return self._lower[case]

    @cached_property
    def _lower(self) -> list[int | None]:
        sweeps: dict[tuple[Any, ...], list[int]] = {}
        for case in range(len(self._cases)):
            sweeps.setdefault(self.key(case), []).append(case)
        lower: list[int | None] = [None] * len(self._cases)
        for cases in sweeps.values():
            for case in cases:
                smaller = (other for other in cases if self.rank(other)[0] < self.rank(case)[0])
                lower[case] = max(smaller, key=self.rank, default=None)
        return lower
