"""What an attack has cost so far: every image that went through the model is counted here, whoever asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ledger", "Remark", "Stage"]


@dataclass(frozen=True)
class Remark:
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


class Ledger:
    """Counts for each of N examples.

    Attributes:
        forwards: Images through the model, judging included, (N,) int64.
        backwards: Gradients taken, (N,) int64.
        flat: Gradients without signal: exactly zero, not finite, or without any graph, (N,) int64.
        stages: What each finished stage cost.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self.forwards, self.backwards, self.flat = torch.zeros(3, n, dtype=torch.int64, device=device)
        self.stages: list[Stage] = []

    def add(self, count: Tensor, rows: Tensor | slice, amount: int | Tensor = 1) -> None:
        """Add `amount` to `count` (one of the three above) for some of the examples, as often as they are named."""
        if isinstance(rows, slice):
            count[rows].add_(amount)
        else:
            count.index_add_(0, rows, torch.as_tensor(amount, device=count.device).expand(len(rows)))

    @contextmanager
    def stage(self, name: str, solved: Tensor) -> Iterator[None]:
        """Book what happens inside under `name`; `solved` (N,) bool is read before and after."""
        before = torch.stack([self.forwards.sum(), self.backwards.sum(), solved.sum()])
        yield
        spent = torch.stack([self.forwards.sum(), self.backwards.sum(), solved.sum()]) - before
        self.stages.append(Stage(name, *spent.tolist()))
