"""What an attack has cost and found so far: every image that went through the model is counted here, whoever asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Check", "Ledger", "Message", "Stage", "sum_checks"]


@dataclass(frozen=True)
class Message:
    """One thing that the reader of a result should know: a short fixed name and the evidence in one line."""

    name: str
    why: str


@dataclass(frozen=True)
class Stage:
    """A part of a run: what it cost over all examples, and how many it solved."""

    name: str
    forwards: int
    backwards: int
    solved: int


@dataclass(frozen=True)
class Check:
    """What one check saw, in how many of so many cases; evidence of several batches adds up.

    Attributes:
        name: Of the check.
        hits: The cases in which it was so.
        of: All cases.
        limit: The largest share of hits that a sound model would show.
    """

    name: str
    hits: int
    of: int
    limit: float = 0.5


def sum_checks(checks: Iterable[Check]) -> tuple[Check, ...]:
    """One row a name, in the order of the first ones."""
    sums: dict[str, Check] = {}
    for one in checks:
        old = sums.get(one.name, Check(one.name, 0, 0, one.limit))
        sums[one.name] = Check(one.name, old.hits + one.hits, old.of + one.of, max(old.limit, one.limit))
    return tuple(sums.values())


class Ledger:
    """Counts for each of N examples.

    Attributes:
        forwards: Images through the model, judging included, (N,) int64.
        backwards: Gradients taken, (N,) int64.
        flat: Gradients without signal: exactly zero, not finite, or without any graph, (N,) int64.
        stages: What each finished stage cost; a stage inside another is no part of that one.
        solver: The number among the stages of the one that solved each example; -1 where none did, (N,) int64.
        evidence: What checks have seen.
        notes: Facts worth knowing.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.forwards, self.backwards, self.flat = torch.zeros(3, n, dtype=torch.int64, device=device)
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self.solver = torch.full((n,), -1, dtype=torch.int64, device=device)
        self.stages: list[Stage] = []
        self.checks: list[Check] = []
        self.notes: list[Message] = []

    def add(self, count: Tensor, rows: Tensor | slice, amount: int | Tensor = 1) -> None:
        """Add `amount` to `count` (one of the three above) for some of the examples, as often as they are named."""
        if isinstance(rows, slice):
            count[rows].add_(amount)
        else:
            amount = amount if isinstance(amount, Tensor) else self._one * amount
            count.index_add_(0, rows, amount.expand(len(rows)))

    @contextmanager
    def stage(self, name: str, solved: Tensor) -> Iterator[None]:
        """Book what happens inside under `name`; `solved` (N,) bool is read before and after."""
        seen, before = solved.clone(), self._sums(solved)
        inside = self._booked()
        yield
        spent = self._sums(solved) - before - (self._booked() - inside)
        self.solver[solved & ~seen & (self.solver < 0)] = len(self.stages)
        self.stages.append(Stage(name, *spent.tolist()))

    def _sums(self, solved: Tensor) -> Tensor:
        return torch.stack([self.forwards.sum(), self.backwards.sum(), solved.sum()])

    def _booked(self) -> Tensor:
        """What all finished stages hold."""
        booked = [(stage.forwards, stage.backwards, stage.solved) for stage in self.stages]
        return torch.tensor([(0, 0, 0), *booked], device=self.forwards.device).sum(0)
