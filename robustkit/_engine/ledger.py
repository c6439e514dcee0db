"""The cost of a run, with every model query counted, and the checks, stages and messages that it recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Check", "Ledger", "Message", "Stage", "sum_checks"]


@dataclass(frozen=True)
class Message:
    """A flag or a note of a result: a short fixed name, and the reason in one line."""

    name: str
    why: str


@dataclass(frozen=True)
class Stage:
    """A part of a run: its cost, summed over all examples, and the number of examples that it solved."""

    name: str
    forwards: int
    backwards: int
    solved: int


@dataclass(frozen=True)
class Check:
    """The outcome of a diagnostic check as counts, which are summed over batches.

    Attributes:
        name: Name of the check.
        hits: Number of cases in which it was positive.
        of: Number of cases.
        limit: The largest share of hits that a sound model would show.
    """

    name: str
    hits: int
    of: int
    limit: float = 0.5


def sum_checks(checks: Iterable[Check]) -> tuple[Check, ...]:
    """Sum checks of the same name, in the order in which the names first occur; the limit is the largest one."""
    sums: dict[str, Check] = {}
    for check in checks:
        old = sums.get(check.name, Check(check.name, 0, 0, check.limit))
        sums[check.name] = Check(check.name, old.hits + check.hits, old.of + check.of, max(old.limit, check.limit))
    return tuple(sums.values())


class Ledger:
    """Counts for each of N examples.

    Attributes:
        forwards: Number of forward passes, the final evaluation included, (N,) int64.
        backwards: Number of gradients computed, (N,) int64.
        flat: Number of gradients without a signal (exactly zero, not finite, or without a graph), (N,) int64.
        stages: Cost of each finished stage, without that of stages nested inside it.
        solver: Index into `stages` of the stage that solved each example; -1 where none did, (N,) int64.
        checks: The recorded checks.
        notes: The recorded notes.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.forwards: Tensor
        self.backwards: Tensor
        self.flat: Tensor
        self.forwards, self.backwards, self.flat = torch.zeros(3, n, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self.solver = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.stages: list[Stage] = []
        self.checks: list[Check] = []
        self.notes: list[Message] = []

    def add(self, count: Tensor, rows: Tensor | slice, amount: int | Tensor = 1) -> None:
        """Add `amount` to `count` (one of the three above) at `rows`; an index that occurs twice is charged twice."""
        if isinstance(rows, slice):
            count[rows].add_(amount)
        else:
            amount = amount if isinstance(amount, Tensor) else self._one * amount
            count.index_add_(0, rows, amount.expand(len(rows)))

    def charge(self, rows: Tensor | slice, forwards: int | Tensor, backwards: int | Tensor, flat: int | Tensor = 0) -> None:
        """Add to all three counts at `rows`."""
        for count, amount in ((self.forwards, forwards), (self.backwards, backwards), (self.flat, flat)):
            self.add(count, rows, amount)

    @contextmanager
    def stage(self, name: str, solved: Tensor) -> Iterator[None]:
        """Record the cost of the `with` block as stage `name`; `solved` (N,) bool is read before and after it."""
        solved_before, totals_before, stages_before = solved.clone(), self._totals(solved), self._stage_totals()
        yield
        nested = self._stage_totals() - stages_before
        spent = self._totals(solved) - totals_before - nested
        self.solver[solved & ~solved_before & (self.solver < 0)] = len(self.stages)
        self.stages.append(Stage(name, *spent.tolist()))

    def _totals(self, solved: Tensor) -> Tensor:
        """Forwards, backwards and solved examples so far, (3,)."""
        return torch.stack([self.forwards.sum(), self.backwards.sum(), solved.sum()])

    def _stage_totals(self) -> Tensor:
        """Forwards, backwards and solved examples of all finished stages, (3,)."""
        counts = [(stage.forwards, stage.backwards, stage.solved) for stage in self.stages]
        return torch.tensor([(0, 0, 0), *counts], device=self.forwards.device).sum(0)
