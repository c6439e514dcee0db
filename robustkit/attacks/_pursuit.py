"""How near each example has come to the goal, and runs that bring it nearer: what the stages of a cascade share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from robustkit._tensors import dot, over
from robustkit.attacks._locations import told
from robustkit.attacks._windows import moved
from robustkit.goals import Goal, Out
from robustkit.losses import Loss
from robustkit.problem import Problem

__all__ = ["Pursuit", "descend"]

_REACH = 2.0  # the first step of a descent in budgets; the last is next to nothing
_PARTS = 9  # of a goal, the likeliest ones, are looked at


def descend(problem: Problem, x_adv: Tensor, steps: int, reach: float = _REACH) -> Tensor:
    """Of the iterates of gradient descent with steps that shrink like a cosine, the one of lowest loss, (N, *S)."""
    x, threat = problem.x, problem.threat
    best, lowest = x_adv, torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for step in problem.steps(steps):
        loss, grad = problem.loss_and_grad(x_adv)
        lower = loss < lowest
        best, lowest = torch.where(over(lower, x), x_adv, best), torch.where(lower, loss, lowest)
        fraction = reach / 2 * (1 + math.cos(math.pi * step / steps))
        x_adv = threat.project(threat.step(-grad, x_adv, x, fraction), x)
    return best


@final
class Pursuit:
    """The examples of a problem, the nearest point to the goal that was found for each, and how near it is.

    How near: the edge of the goal, as a share of that at x. It is the example's own, so that what is done for it depends on no
    other example.

    Attributes:
        problem: The examples.
        nearest: The points, (N, *S).
        edge: The edge of the goal there, (N,).
        clean: The edge at x, (N,).
        skipped: For how many examples each stage was too dear.
    """

    def __init__(self, problem: Problem, surrogate: Loss, budget: int | None) -> None:
        self.problem, self.surrogate, self.budget = problem, surrogate, budget
        self.nearest, self.edge = problem.x, torch.full((len(problem),), torch.inf, device=problem.x.device)
        self.clean = self.edge.clone()
        self.skipped: dict[str, int] = {}
        self._runs = 0
        self._parts: list[tuple[Goal, Tensor]] = []
        self._order = torch.zeros(len(problem), 0, dtype=torch.int64, device=problem.x.device)

    def look(self) -> None:
        """Take the edges at x, and order the parts of the goal by how much of its edge a linear model would leave of each.

        The budget takes from an edge at most what the steepest point of the threat set gains. Parts without any gradient come
        last, in the order in which the goal names them.
        """
        rows, found = self.problem.open.nonzero().squeeze(1), []
        some = self.problem[rows]
        goal = some.goal.by(self.surrogate)

        def edges(out: Out, ref: Tensor) -> Iterator[Tensor]:
            self._parts = [(part, _spread(wanted, rows, self.problem.ref)) for part, wanted in goal.parts(out, ref)[:_PARTS]]
            self.clean[rows] = goal.edge(out, ref).detach().to(self.clean)
            return (part.edge(out, wanted[rows]) for part, wanted in self._parts)

        for edge, grad in some.gradients(some.x, edges):
            gain = dot(-grad, some.threat.steepest(-grad, some.x) - some.x)
            found.append(torch.where(gain > 0, edge / gain, torch.inf))
        self.edge = self.clean.clone()
        self._order = torch.zeros(len(self.problem), len(found), dtype=torch.int64, device=rows.device)
        self._order[rows] = torch.stack(found, 1).argsort(dim=1, stable=True)

    def rows(self, name: str, cost: int, within: float = math.inf) -> Tensor:
        """The open examples that have come within a share of their first edge and can pay for a stage, as indices."""
        problem = self.problem
        hopeless = (self.edge > within * self.clean) & (self.clean > 0)
        wanted = problem.open & ~hopeless
        if self.budget is not None:
            affordable = problem.spent + cost <= self.budget
            self.skipped[name] = self.skipped.get(name, 0) + int((wanted & ~affordable).sum())
            wanted &= affordable
        return wanted.nonzero().squeeze(1)

    def towards(self, rows: Tensor, rank: int) -> Iterator[tuple[Tensor, Goal, Tensor]]:
        """The part of this rank for each of the examples `rows`: those that share a goal, the goal, its reference."""
        chosen = self._order[rows, rank]
        groups: list[tuple[Goal, list[int]]] = []
        for number, (goal, _) in enumerate(self._parts):
            same = next((numbers for known, numbers in groups if known == goal), None)
            if same is None:
                groups.append((goal, [number]))
            else:
                same.append(number)
        for goal, numbers in groups:
            refs = torch.stack([self._parts[number][1] for number in numbers])
            place = torch.full((len(self._parts),), -1, device=rows.device)
            place[numbers] = torch.arange(len(numbers), device=rows.device)
            mine = place[chosen] >= 0
            if mine.any():
                yield rows[mine], goal, refs[place[chosen[mine]], rows[mine]]

    @property
    def parts(self) -> int:
        """How many parts of the goal there are to pursue."""
        return self._order.shape[1]

    def run(self, rows: Tensor, goal: Goal, ref: Tensor, steps: int) -> None:
        """Descend the loss of a goal, `ref` a row each, from a random point."""
        if len(rows):
            self._runs += 1
            some = self.problem[rows]
            self.take(rows, descend(some.following(goal, ref), some.start(self._runs), steps))

    def polish(self, rows: Tensor, steps: int, reach: float) -> None:
        """Descend the surrogate from the nearest points, with smaller steps."""
        if len(rows):
            some = self.problem[rows]
            self.take(rows, descend(some.following(some.goal.by(self.surrogate), some.ref), self.nearest[rows], steps, reach))

    def search(self, rows: Tensor, queries: int, share: float) -> None:
        """Change windows at random, from the nearest points, as the Square attack does; what comes nearer stays."""
        problem = self.problem
        x_adv, value = self.nearest[rows], self.edge[rows].double()
        for query in range(queries):
            still = problem.open[rows]
            rows, x_adv, value = rows[still], x_adv[still], value[still]
            if not len(rows):
                return
            some = problem[rows]
            candidate = moved(some.threat, x_adv, some.x, share, some.noise("windows", query))
            edge = told(some.goal.edge(some.answer(candidate), some.ref))
            lower = edge < value
            x_adv, value = torch.where(over(lower, x_adv), candidate, x_adv), torch.where(lower, edge, value)
        self._keep(rows, x_adv, value)

    def take(self, rows: Tensor, x_adv: Tensor) -> None:
        """Ask at points (M, *S) of the examples `rows` (M,), and keep those that are nearer."""
        left = self.problem.open[rows]
        rows, x_adv = rows[left], x_adv[left]
        if len(rows):
            some = self.problem[rows]
            self._keep(rows, x_adv, some.goal.edge(some.answer(x_adv), some.ref))

    def _keep(self, rows: Tensor, x_adv: Tensor, edge: Tensor) -> None:
        nearer = edge < self.edge[rows]
        self.nearest = self.nearest.index_copy(0, rows, torch.where(over(nearer, x_adv), x_adv, self.nearest[rows]))
        self.edge[rows] = torch.where(nearer, edge.to(self.edge), self.edge[rows])


def _spread(wanted: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """References of the examples `rows` in a tensor with a row for each of all examples."""
    return torch.zeros(len(like), *wanted.shape[1:], dtype=wanted.dtype, device=wanted.device).index_copy(0, rows, wanted)
