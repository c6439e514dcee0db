"""The evaluation by which robustness is to be measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import Tensor

from robustkit.attack import Attack
from robustkit.attacks._checks import at_least
from robustkit.attacks._escalation import escalated
from robustkit.attacks._pursuit import Pursuit, Run
from robustkit.attacks.audit import Audit
from robustkit.errors import ArgumentError
from robustkit.losses import margin, probability_margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["STAGES", "Standard"]

STAGES: Final = ("descent", "parts", "windows", "others", "polish", "restarts")


@final
@dataclass(frozen=True)
class Round:
    """What is done for the examples that have come within a share of their first edge: the nearer, the more.

    Attributes:
        within: The share.
        polish: Steps of each of two descents from the nearest point, short and shorter.
        restarts: Descents from random points.
        steps: Of each of them.
        queries: Of the search over windows.
        others: Whether the parts of the goal that were not tried on all examples are tried on these.
    """

    within: float
    polish: int
    restarts: int
    steps: int
    queries: int
    others: bool = False


_ROUNDS: Final = (
    Round(0.5, 0, 0, 0, 150),
    Round(0.15, 20, 1, 50, 300, others=True),
    Round(0.05, 20, 4, 50, 600),
    Round(0.02, 30, 6, 100, 1500),
)
_SHARE = 0.05  # of an image is what a window covers
_REACHES = (0.5, 0.1)  # of the two descents of a polish, in budgets


@final
@dataclass(frozen=True)
class Standard(Attack):
    """A cascade: each stage works on what those before have left, and the dear ones on the nearest misses alone.

    1. "descent": along the margin of the probabilities, from a random point, with steps that shrink like a cosine.
    2. "parts": the same along the margin of one part of the goal after another (for misclassification: towards one other
       class), in the order of how much of the way a linear model would leave, from random points.
    3. Four rounds for those that have come near, the nearer the more: "windows", the random search of the Square attack, but
       from the nearest point; "others", the parts not tried yet; "polish", short steps from the nearest point; "restarts"
       towards the two likeliest parts.

    How near an example is it tells itself: the edge of the goal at the nearest point as a share of that at x. So no result
    depends on other examples, and none of the numbers on a data set; docs/standard.md has what each stage buys.

    Attributes:
        steps: Of each descent.
        parts: How many parts of the goal are tried on every example.
        budget: The most forwards that an example may cost, a gradient counted as two; None for no bound. Stages that would
            exceed it are skipped, and a note says for how many examples.
        skip: A stage to leave out, to see what it buys; "" for none.

    Sources: the margin of probabilities: Xie et al. 2024 (https://arxiv.org/abs/2411.15210); one class after another: Gowal et
    al. 2019 (https://arxiv.org/abs/1910.09338); effort where the margin is small: Liu et al. 2022
    (https://arxiv.org/abs/2203.05154); windows: Andriushchenko et al. 2020 (https://arxiv.org/abs/1912.00049). The order by a
    linear model, the search from the nearest point and the rounds are ours.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    steps: int = 20
    parts: int = 3
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
        pursuit, x_adv = Pursuit(problem, self.budget), None
        with problem.stage("look"):
            pursuit.look()
        with problem.stage("descent"):
            rows = self._rows(pursuit, "descent", 3 * self.steps + 1)
            goal = problem.goal.by(probability_margin)
            pursuit.run([Run(rows, goal, problem.ref[rows], pursuit.start(rows))], self.steps)
        with problem.stage("parts"):
            for rank in range(min(self.parts, pursuit.parts)):
                rows = self._rows(pursuit, "parts", 3 * self.steps + 1)
                pursuit.run(list(pursuit.towards(rows, rank)), self.steps)
        for one in _ROUNDS:
            self._round(problem, pursuit, one)
        if self.audit:
            with problem.stage("audit"):
                Audit().run(problem)
            x_adv = escalated(problem)
        for name, count in pursuit.skipped.items():
            problem.tell("budget", f"{self.budget} was too little for {name} on {count} examples")
        return pursuit.nearest if x_adv is None else x_adv

    def _round(self, problem: Problem, pursuit: Pursuit, one: Round) -> None:
        with problem.stage("windows"):
            pursuit.search(self._rows(pursuit, "windows", one.queries, one.within), one.queries, _SHARE)
        others = range(self.parts, pursuit.parts) if one.others else range(0)
        with problem.stage("others"):
            rows = self._rows(pursuit, "others", len(others) * (3 * self.steps + 1), one.within)
            pursuit.run([run for rank in others if len(rows) for run in pursuit.towards(rows, rank)], self.steps)
        with problem.stage("polish"):
            for reach in _REACHES if one.polish else ():
                rows = self._rows(pursuit, "polish", 3 * one.polish + 1, one.within)
                goal = problem.goal.by(margin)
                pursuit.run([Run(rows, goal, problem.ref[rows], pursuit.nearest[rows])], one.polish, reach)
        with problem.stage("restarts"):
            rows = self._rows(pursuit, "restarts", (3 * one.steps + 1) * one.restarts, one.within)
            ranks = [number % min(2, pursuit.parts) for number in range(one.restarts)] if len(rows) else []
            pursuit.run([run for rank in ranks for run in pursuit.towards(rows, rank)], one.steps)

    def _rows(self, pursuit: Pursuit, stage: str, cost: int, within: float = math.inf) -> Tensor:
        rows = pursuit.rows(stage, cost, within)
        return rows[:0] if stage == self.skip else rows
