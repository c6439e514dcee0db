"""The best point of each example that an attack has visited, and which examples are unsolved: the state of a run."""

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
    """Raise an ArgumentError unless `keep` is one of the four rules."""
    if keep not in get_args(Keep):
        raise ArgumentError(f"keep={keep!r} must be one of {', '.join(get_args(Keep))}")


@final
class _BestPoints:
    """One point for each of N examples with its score, lower is better; the score is infinite where there is no point.

    Attributes:
        x_adv: The points, (N, *S).
        score: Their scores, (N,) float64.
        success: Whether they reach the goal, (N,) bool.
    """

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x
        self.score = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.success = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, rows: Tensor, x_adv: Tensor, score: Tensor, success: Tensor) -> Tensor:
        """Keep the points (M, *S) of the examples `rows` (M,) that are better; a success is better than any failure.

        Returns:
            The rows that changed.
        """
        better = torch.where(success == self.success[rows], score < self.score[rows], success).nonzero().squeeze(1)
        if not bool((rows[1:] > rows[:-1]).all()):
            better = _one_per_row(better, rows, score, success, len(self.x_adv))
        at = rows[better]
        self.x_adv[at], self.score[at], self.success[at] = x_adv[better], score[better], success[better]
        return at


def _one_per_row(better: Tensor, rows: Tensor, score: Tensor, success: Tensor, n: int) -> Tensor:
    """Of the points `better` (K,) of N examples `rows` (M,), the best of each example; of equal ones the first."""
    # Sorted so that the best point of an example is its last one: failures first, then by falling score, then backwards.
    order = better.flip(0)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(success[order].long(), stable=True)]
    place = torch.arange(len(order), device=rows.device)
    last = torch.zeros(n, dtype=torch.int64, device=rows.device).scatter_reduce(0, rows[order], place, "amax")
    return order[last[rows[order]] == place]


@final
class BestSoFar:
    """The best visited point of each of N examples, by one of four rules, and which examples are unsolved.

    "first": the first success inside the threat; the example is solved and skipped from then on. "best": a success before
    a failure, then the lowest loss of the goal. "smallest": the smallest success inside the threat. "last": no point is
    kept and none is evaluated before the end. On a stochastic target one success may be luck, so no example is skipped,
    and two points of each compete in the end: the one of lowest loss, and the one of lowest loss among the successes.

    Attributes:
        ledger: The counts of the run.
        checked: Whether the first output was checked, which also shows whether the target is stochastic.
        first_output_checks: What the first output has shown.
        stochastic: Whether two calls on the same input may differ.
        unsolved: Which examples are unsolved, (N,) bool.
        best: The best points.
        lowest: On a stochastic target, the points of lowest loss.
    """

    def __init__(self, keep: Keep, x: Tensor, stochastic: bool | None) -> None:
        self.keep, self.ledger, self.checked = keep, Ledger(len(x), x.device), False
        self._declared, self.stochastic = stochastic, bool(stochastic)
        self.first_output_checks: list[Check] = []
        self.unsolved = torch.ones(len(x), dtype=torch.bool, device=x.device)
        # With "last" no point is ever written, so the inputs serve without a copy.
        self.best, self.lowest = (_BestPoints(x if keep == "last" else x.clone()) for _ in range(2))

    @property
    def checks(self) -> list[Check]:
        """The recorded checks, and those of the first output that no recorded check has repeated."""
        recorded = {check.name for check in self.ledger.checks}
        return [*self.ledger.checks, *(check for check in self.first_output_checks if check.name not in recorded)]

    def set_stochastic(self, *, stochastic: bool) -> None:
        """Record whether the first call drew random numbers; what the target declares takes precedence."""
        self.checked = True
        self.stochastic = stochastic if self._declared is None else self._declared

    @property
    def declared(self) -> bool:
        """Whether the target declares if it is stochastic."""
        return self._declared is not None

    @property
    def early_stop(self) -> bool:
        """Whether solved examples are skipped."""
        return self.keep in ("first", "smallest") and not self.stochastic

    @property
    def tracks_best(self) -> bool:
        """Whether iterates are evaluated at all."""
        return self.keep != "last"

    @property
    def compares_loss(self) -> bool:
        """Whether points are compared by the loss of the goal; otherwise it need not be computed."""
        return self.tracks_best and not self.early_stop

    def update(self, rows: Tensor, x_adv: Tensor, x: Tensor, threat: Threat, success: Tensor, loss: Tensor | None) -> None:
        """Keep the points inside the threat that are better than the best so far.

        Args:
            rows: The examples, (M,); one may occur several times.
            x_adv: The points, (M, *S).
            x: The clean inputs, (M, *S).
            threat: The threat of these examples.
            success: Whether the points reach the goal, (M,) bool.
            loss: The goal's loss there, (M,); needed where points are compared by it.
        """
        if not self.tracks_best:
            return
        candidate = success if self.early_stop else torch.ones_like(success)
        if self.early_stop and self.keep == "first":
            candidate = candidate & self.unsolved[rows]  # solved examples may be queried again; their first success stays
        new = candidate.nonzero().squeeze(1)
        if len(new):
            new = new[threat[new].contains(x_adv[new], x[new])]
        if not len(new):
            return
        rows, x_adv, success = rows[new], x_adv[new], success[new]
        if self.keep == "smallest" and not self.stochastic:
            score = threat[new].size(x_adv, x[new])
        elif self.early_stop:  # of several points of one example in one query, the first is kept
            score = torch.arange(len(new), device=rows.device, dtype=torch.float64)
        else:
            assert loss is not None
            # An undefined loss is the best of successes and the worst of failures.
            score = torch.where(loss[new].isnan(), torch.where(success, -torch.inf, torch.inf), loss[new].double())
        changed = self.best.update(rows, x_adv, score, success)
        if self.stochastic:
            self.lowest.update(rows, x_adv, score, torch.zeros_like(success))
        elif self.keep == "first":
            self.unsolved[changed] = False
