"""Which of the points that an attack visits comes back: the state of a run, one row an example."""

from __future__ import annotations

from typing import Literal, final, get_args

import torch
from torch import Tensor

from robustkit.errors import ArgumentError
from robustkit.ledger import Ledger
from robustkit.threats import Threat

__all__ = ["Keep", "Kept", "check_keep"]

Keep = Literal["first", "best", "smallest", "last"]


def check_keep(keep: str) -> None:
    """Refuse a word that is none of the four."""
    if keep not in get_args(Keep):
        raise ArgumentError(f"keep={keep!r} must be one of {', '.join(get_args(Keep))}")


@final
class Kept:
    """The best visited point of each of N examples, by one of four rules, and who is still open.

    "first": the first success inside the threat; its example leaves at once. "best": a success before a failure, then
    the lowest loss of the goal. "smallest": the smallest success inside the threat. "last": nothing is kept and nothing
    judged on the way. On a stochastic target a success may be luck, so nobody leaves and the lowest loss is kept.

    Attributes:
        ledger: The counts of the run.
        checked: Whether the first output has been seen, and with it whether the target is stochastic.
        stochastic: Whether two calls on the same input may differ.
        open: Which examples are not solved, (N,) bool.
        found: Which examples have a kept success, (N,) bool.
    """

    def __init__(self, keep: Keep, x: Tensor, stochastic: bool | None) -> None:
        n = len(x)
        self.keep, self.ledger, self.checked = keep, Ledger(n, x.device), False
        self._declared, self.stochastic = stochastic, bool(stochastic)
        self.x_adv = x.clone()
        self.open = torch.ones(n, dtype=torch.bool, device=x.device)
        self.found = torch.zeros_like(self.open)
        self.score = torch.full((n,), torch.inf, dtype=torch.float64, device=x.device)

    def found_out(self, *, stochastic: bool) -> None:
        """Take note of whether the first call drew random numbers, unless the target had declared it."""
        self.checked = True
        self.stochastic = stochastic if self._declared is None else self._declared

    @property
    def leaving(self) -> bool:
        """Whether solved examples leave the batch."""
        return self.keep == "first" and not self.stochastic

    @property
    def judging(self) -> bool:
        """Whether points on the way are judged at all."""
        return self.keep != "last"

    def offer(self, rows: Tensor | slice, x_adv: Tensor, x: Tensor, threat: Threat, reached: Tensor, loss: Tensor) -> None:
        """Keep the points (M, *S) of the examples `rows` that are better than what they had."""
        if not self.judging:
            return
        if self.keep == "best" or self.stochastic:
            score = loss.double()
            better = torch.where(reached == self.found[rows], score < self.score[rows], reached)
            if self.stochastic:
                better = score < self.score[rows]
        else:
            score = torch.zeros_like(loss, dtype=torch.float64) if self.keep == "first" else threat.size(x_adv, x)
            better = reached & (score < self.score[rows])
        new = better.nonzero().squeeze(1)
        if len(new):
            new = new[threat[new].contains(x_adv[new], x[new])]
        rows = torch.arange(len(self.open), device=x.device)[rows][new]
        self.x_adv[rows], self.score[rows], self.found[rows] = x_adv[new], score[new], reached[new]
        if self.leaving:
            self.open[rows] = False
