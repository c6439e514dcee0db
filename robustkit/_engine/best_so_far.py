"""Which of the points that an attack visits comes back: the state of a run, one row an example."""

from __future__ import annotations

from typing import Literal, final, get_args

import torch
from torch import Tensor

from robustkit._engine.ledger import Check, Ledger
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

__all__ = ["BestSoFar", "Keep", "check_keep"]

Keep = Literal["first", "best", "smallest", "last"]


def check_keep(keep: str) -> None:
    """Refuse a word that is none of the four."""
    if keep not in get_args(Keep):
        raise ArgumentError(f"keep={keep!r} must be one of {', '.join(get_args(Keep))}")


@final
class _Incumbent:
    """One point for each of N examples, with a score: the lower, the better; infinite where there is none."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x
        self.score = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.found = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def put(self, rows: Tensor, x_adv: Tensor, score: Tensor, reached: Tensor) -> Tensor:
        """Take what is better for the examples `rows` (M,), a success before a failure; returns the rows that changed."""
        better = torch.where(reached == self.found[rows], score < self.score[rows], reached).nonzero().squeeze(1).flip(0)
        # One example may be named several times: of its points the best is taken, of equal ones the first; sorting makes it
        # the last.
        order = better[torch.argsort(score[better], descending=True, stable=True)]
        order = order[torch.argsort(reached[order].long(), stable=True)]
        place = torch.arange(len(order), device=rows.device)
        last = torch.zeros_like(self.found, dtype=torch.int64).scatter_reduce(0, rows[order], place, "amax")
        best = order[last[rows[order]] == place]
        at = rows[best]
        self.x_adv[at], self.score[at], self.found[at] = x_adv[best], score[best], reached[best]
        return at


@final
class BestSoFar:
    """The best visited point of each of N examples, by one of four rules, and who is still open.

    "first": the first success inside the threat; its example leaves at once. "best": a success before a failure, then
    the lowest loss of the goal. "smallest": the smallest success inside the threat. "last": nothing is kept and nothing
    judged on the way. On a stochastic target a success may be luck, so nobody leaves, and two points are kept to compete
    later: the lowest loss, and the lowest loss among those that were seen to succeed.

    Attributes:
        ledger: The counts of the run.
        checked: Whether the first output has been seen, and with it whether the target is stochastic.
        noticed: What the first output has shown by itself.
        stochastic: Whether two calls on the same input may differ.
        open: Which examples are not solved, (N,) bool.
        best: The kept points.
        lowest: On a stochastic target, the points of lowest loss.
    """

    def __init__(self, keep: Keep, x: Tensor, stochastic: bool | None) -> None:
        self.keep, self.ledger, self.checked = keep, Ledger(len(x), x.device), False
        self._declared, self.stochastic = stochastic, bool(stochastic)
        self.first_output_checks: list[Check] = []
        self.unsolved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        # Where nothing is kept, nothing is written: then the inputs themselves stand there, without a copy.
        self.best, self.lowest = (_Incumbent(x if keep == "last" else x.clone()) for _ in range(2))

    @property
    def checks(self) -> list[Check]:
        """What checks have seen; what the first output has shown, where none of them has looked at that."""
        looked = {one.name for one in self.ledger.checks}
        return [*self.ledger.checks, *(one for one in self.first_output_checks if one.name not in looked)]

    def set_stochastic(self, *, stochastic: bool) -> None:
        """Take note of whether the first call drew random numbers, unless the target had declared it."""
        self.checked = True
        self.stochastic = stochastic if self._declared is None else self._declared

    @property
    def declared(self) -> bool:
        """Whether the target has said if it is stochastic."""
        return self._declared is not None

    @property
    def early_stop(self) -> bool:
        """Whether solved examples leave the batch: at their first success, or where no change at all was needed."""
        return self.keep in ("first", "smallest") and not self.stochastic

    @property
    def tracks_best(self) -> bool:
        """Whether points on the way are judged at all."""
        return self.keep != "last"

    @property
    def compares_loss(self) -> bool:
        """Whether points are compared by the loss of the goal; where it is not asked for, it need not be computed."""
        return self.tracks_best and not self.early_stop

    def update(self, rows: Tensor, x_adv: Tensor, x: Tensor, threat: Threat, reached: Tensor, loss: Tensor | None) -> None:
        """Keep those of the points (M, *S) of the examples `rows` (M,) that are better than what they had.

        `loss` (M,) is that of the goal, needed where points are weighed by it.
        """
        if not self.tracks_best:
            return
        worth = reached if self.early_stop else torch.ones_like(reached)
        if self.early_stop and self.keep == "first":
            worth = (
                worth & self.unsolved[rows]
            )  # who has left may be asked again, for the sake of others; the first success stays
        new = worth.nonzero().squeeze(1)
        if len(new):
            new = new[threat[new].contains(x_adv[new], x[new])]
        if not len(new):
            return
        rows, x_adv, reached = rows[new], x_adv[new], reached[new]
        if self.keep == "smallest" and not self.stochastic:
            score = threat[new].size(x_adv, x[new])
        elif self.early_stop:  # of several points of an example in one question, the one that was named first
            score = torch.arange(len(new), device=rows.device, dtype=torch.float64)
        else:
            assert loss is not None
            # An undefined loss is the best of successes and the worst of failures.
            score = torch.where(loss[new].isnan(), torch.where(reached, -torch.inf, torch.inf), loss[new].double())
        changed = self.best.put(rows, x_adv, score, reached)
        if self.stochastic:
            self.lowest.put(rows, x_adv, score, torch.zeros_like(reached))
        elif self.keep == "first":
            self.unsolved[changed] = False
