"""The evaluation that robustness is to be measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from robustkit.attack import Attack
from robustkit.attacks._checks import at_least, positive
from robustkit.attacks._pursuit import Pursuit
from robustkit.losses import margin, probability_margin
from robustkit.problem import Problem

__all__ = ["Standard"]


@final
@dataclass(frozen=True)
class Standard(Attack):
    """A cascade of cheap, diverse stages, each on what the ones before have left, the dear ones on the nearest misses alone."""

    steps: int = 20
    targets: int = 3
    within: float = 0.3
    near: float = 0.15
    restarts: int = 2
    restart_steps: int = 50
    queries: int = 600
    share: float = 0.05
    budget: int | None = None
    rounds: tuple[tuple[str, float, int, int, int], ...] = (
        ("A", 0.5, 0, 0, 150),
        ("B", 0.15, 20, 1, 300),
        ("C", 0.05, 20, 4, 800),
    )
    last: int = 9

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps)
        positive(share=self.share)

    def run(self, problem: Problem) -> Tensor:
        """The stages in their order."""
        pursuit = Pursuit(problem, margin, self.budget)
        with problem.stage("look"):
            pursuit.look()
        with problem.stage("descent"):
            rows = pursuit.rows("descent", 3 * self.steps)
            goal = problem.goal.by(probability_margin)
            pursuit.run(rows, goal, problem.ref[rows], self.steps)
        for rank in range(min(self.last, pursuit.parts)):
            near = rank >= self.targets
            with problem.stage("more parts" if near else f"part {rank + 1}"):
                rows = pursuit.rows("parts", 3 * self.steps, self.within if near else float("inf"))
                for some, goal, ref in pursuit.towards(rows, rank):
                    pursuit.run(some, goal, ref, self.steps)
        for name, nearness, polish, restarts, queries in self.rounds:
            if polish:
                with problem.stage("polish" + name):
                    for reach in (0.5, 0.1):
                        rows = pursuit.rows("polish", 3 * self.steps, nearness)
                        pursuit.polish(rows, polish, reach)
            with problem.stage("restarts" + name):
                for number in range(restarts):
                    rows = pursuit.rows("restarts", 3 * self.restart_steps, nearness)
                    for some, goal, ref in pursuit.towards(rows, number % min(2, pursuit.parts)):
                        pursuit.run(some, goal, ref, self.restart_steps)
            with problem.stage("windows" + name):
                rows = pursuit.rows("windows", queries, nearness)
                pursuit.search(rows, queries, self.share)
        return pursuit.nearest
