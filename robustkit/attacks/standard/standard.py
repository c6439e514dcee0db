"""The evaluation by which robustness is to be measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from typing import ClassVar, Final, final

from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit.attack import Attack
from robustkit.attacks.standard.audit import Audit
from robustkit.attacks.standard.cascade import CascadeState, Run
from robustkit.attacks.standard.escalation import escalate, reasons_to_escalate
from robustkit.errors import ArgumentError
from robustkit.flags import lower_bound
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["STAGES", "Standard"]

STAGES: Final = ("parts", "boundary", "patches", "refine", "restarts")
_ALL: Final = 9  # parts
_AUDIT: Final = 500  # forwards that an example is asked by the audit at most
_DRAWS: Final = 100  # random starts of a round at most: they are numbered


@final
@dataclass(frozen=True)
class EffortLevel:
    """What is done for the examples that have come within a share of their first edge: the nearer, the more.

    Attributes:
        within: The share.
        steps: Of each descent.
        parts: Up to which rank the parts of the goal are pursued; those before this round have been.
        polish: First steps of descents from the nearest point, in budgets.
        restarts: Descents from random points, each in another way.
        queries: Of the search over windows, which comes before the descents.
        share: Of an image is what a window covers; as in Square, the nearer, the smaller.
    """

    within: float
    steps: int
    parts: int
    polish: tuple[float, ...] = ()
    restarts: int = 0
    queries: int = 0
    share: float = 0.02


_ROUNDS: Final = (
    EffortLevel(0.5, 20, 3, queries=150, share=0.05),
    EffortLevel(0.15, 30, 5, (0.5, 0.1), 2, 300),
    EffortLevel(0.07, 40, _ALL, (0.5, 0.1), 6, 600),
    EffortLevel(0.035, 50, _ALL, (0.5, 0.1), 12, 1500),
)
# Walks along the border, one set after another: towards how many parts, and steps.
_WALKS: Final = ((1, 20), (2, 40), (_ALL, 80))
_MISSED: Final = 0.01  # the share that descents may miss without a further set
# How restarts differ: towards the part of which rank, None for the whole goal, and how much of the usual first step.
_WAYS: Final = ((None, 1.0), (0, 0.5), (1, 1.0), (None, 0.5), (0, 1.0), (1, 0.5))


@final
@dataclass(frozen=True)
class Standard(Attack):
    """A cascade: each stage works on what those before have left, and the dear ones on the nearest misses alone.

    1. "parts": descents along the margin of one part of the goal each (for misclassification: towards one other class), from
       random points, with steps that shrink like a cosine; the likeliest parts first, in the order of how much of the way a
       linear model would leave ("first-pass").
    2. "boundary": a walk along the decision boundary from outside, as FAB does; longer ones, towards more parts, where that
       breaks more than 1 % of what descents have left.
    3. Four rounds for those that have come near, the nearer the more: "patches", the random search of the Square attack, but
       from the nearest point, for as long as it gains; "parts", those not tried yet; "restarts": short steps from the nearest
       point, and descents from random points, each in another way.

    How near an example is it tells itself: the edge of the goal at the nearest point as a share of that at x. So none of
    the numbers depends on a data set, and no result on other examples but for the longer walks and the escalation, which a
    batch decides on together; docs/standard.md has what each stage buys. The descents of a round go through the model side
    by side, as far as `Target.batch_size` allows.

    Attributes:
        steps: Of each descent.
        parts: How many parts of the goal are tried on every example.
        budget: The most forwards that an example may cost, a gradient counted as two; None for no bound. Stages that would
            exceed it are skipped, and a note says for how many examples. A target that asks for several draws a gradient, or
            whose view is not its function, costs more than is reckoned with.
        skip: A stage to leave out, to see what it buys; "" for none. "refine" are the restarts from the nearest point.
        audit: Whether it is asked if the number may be believed, and more is done where it may not.

    Sources: one class after another: Gowal et al. 2019 (https://arxiv.org/abs/1910.09338); effort where the margin is small:
    Liu et al. 2022 (https://arxiv.org/abs/2203.05154); windows: Andriushchenko et al. 2020
    (https://arxiv.org/abs/1912.00049); walks: Croce & Hein 2020 (https://arxiv.org/abs/1907.02044). The order by a linear
    model, the search from the nearest point, the steps that stay in the box and the rounds are ours.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    steps: int = 20
    parts: int = 2
    budget: int | None = None
    skip: str = ""
    audit: bool = True

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, parts=self.parts)
        if self.budget is not None:
            at_least(1, budget=self.budget)
        if self.skip and self.skip not in STAGES:
            raise ArgumentError(f"skip={self.skip!r} must be one of {', '.join(STAGES)}, or empty")

    def run(self, problem: Problem) -> Tensor:
        """The stages in their order."""
        pursuit, x_adv = CascadeState(problem, self.budget), None
        with problem.stage("first-pass"):
            pursuit.look()
        tried = 0
        for number, one in enumerate((EffortLevel(math.inf, self.steps, self.parts), *_ROUNDS), start=1):
            ranks: list[int | None] = list(range(tried, min(one.parts, pursuit.parts)))
            tried += len(ranks)
            if number == 1 and pursuit.parts == 1 < self.parts:
                ranks.append(None)  # of a goal that is its only part, a second descent from elsewhere
            self._round(pursuit, one, number, ranks)
            if number == 1:
                with problem.stage("boundary"):
                    self._walks(pursuit)
        if self.audit:
            with problem.stage("audit"):
                asked = problem if self.budget is None else problem[pursuit.rows("audit", _AUDIT)]
                Audit().run(asked)
            if self.budget is None:
                x_adv = escalate(problem)
            elif reasons_to_escalate(problem):
                pursuit.skipped["escalation"] = int(problem.unsolved.sum())
        for name, dear in pursuit.skipped.items():
            problem.add_note("budget", f"{self.budget} was too little for {name} on {dear} examples")
        return pursuit.nearest if x_adv is None else x_adv

    def _round(self, pursuit: CascadeState, one: EffortLevel, number: int, ranks: Sequence[int | None]) -> None:
        with pursuit.problem.stage("patches"):
            rows = pursuit.rows("patches", one.queries, one.within)
            pursuit.search(rows[:0] if self.skip == "patches" else rows, one.queries, one.share, number)
        name = "restarts" if one.restarts else "parts"
        with pursuit.problem.stage(name):
            kinds = {"parts": len(ranks), "refine": len(one.polish), "restarts": one.restarts}
            kinds.pop(self.skip, None)
            rows = pursuit.rows(name, sum(kinds.values()) * _cost(one.steps), one.within)
            draws = count(_DRAWS * number)
            pursuit.run([run for kind in kinds for run in _runs(pursuit, one, rows, kind, ranks, draws)], one.steps)

    def _walks(self, pursuit: CascadeState) -> None:
        """Along the border towards the likeliest part of the goal; longer, and towards more of them, where that finds much.

        Descents see what is inside of the budget, walks come from outside. Where the model is flat around x they find many that
        descents have missed; where it is not, none.
        """
        problem, surprises = pursuit.problem, 0
        for most, steps in _WALKS if self.skip != "boundary" else ():
            ranks = range(min(most, pursuit.parts))
            rows = pursuit.rows("boundary", len(ranks) * _cost(steps), math.inf)
            pursuit.walk([run for rank in ranks for run in pursuit.towards(rows, rank, 0)], steps)
            if lower_bound(int((~problem.unsolved[rows]).sum()), len(rows)) <= _MISSED:
                break
            surprises += 1
        problem.record_check("boundary-breaks", min(1, surprises), 1)


def _runs(
    pursuit: CascadeState, one: EffortLevel, rows: Tensor, kind: str, ranks: Sequence[int | None], draws: Iterator[int]
) -> Iterator[Run]:
    whole, ref = pursuit.problem.goal.with_surrogate(margin), pursuit.problem.ref[rows]
    if kind == "parts":
        for number in ranks:
            yield from pursuit.towards(rows, number, next(draws))
    elif kind == "refine":
        yield from (Run(rows, whole, ref, pursuit.nearest[rows], reach) for reach in one.polish)
    else:
        for way, share in islice(cycle(_WAYS), one.restarts):
            rank = None if way is None else min(way, pursuit.parts - 1)
            yield from pursuit.towards(rows, rank, next(draws), share)


def _cost(steps: int) -> int:
    """Of a descent in forwards: one a step and a gradient, which counts as two, and one for the question at its best point."""
    return 3 * steps + 1
