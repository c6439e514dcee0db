"""How near each example has come to the goal, and runs that bring it nearer: what the stages of a cascade share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from robustkit._random import Noise
from robustkit._tensors import dot, over
from robustkit.attacks._locations import told
from robustkit.attacks._windows import moved
from robustkit.goals import Goal, Out
from robustkit.losses import margin
from robustkit.problem import Problem

__all__ = ["Pursuit", "Run", "descend"]

_REACH = 2.0  # the first step of a descent in budgets; the last is next to nothing
_AT_ONCE = 25  # windows are asked: with few examples left, a step costs its overhead
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


class Run(NamedTuple):
    """A descent that is wanted: for which examples (M,), along which goal, with its reference and from where, a row each."""

    rows: Tensor
    goal: Goal
    ref: Tensor
    x_adv: Tensor


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

    def __init__(self, problem: Problem, budget: int | None) -> None:
        self.problem, self.budget = problem, budget
        self.nearest, self.edge = problem.x, torch.full((len(problem),), torch.inf, device=problem.x.device)
        self.clean = self.edge.clone()
        self.skipped: dict[str, int] = {}
        self._starts = 0
        self._parts: list[tuple[Goal, Tensor]] = []
        self._order = torch.zeros(len(problem), 0, dtype=torch.int64, device=problem.x.device)

    def look(self) -> None:
        """Take the edges at x, and order the parts of the goal by how much of its edge a linear model would leave of each.

        The budget takes from an edge at most what the steepest point of the threat set gains. Parts without any gradient come
        last, in the order in which the goal names them.
        """
        rows, found = self.problem.open.nonzero().squeeze(1), []
        some = self.problem[rows]
        goal = some.goal.by(margin)

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
            dear = int((wanted & ~affordable).sum())
            if dear:
                self.skipped[name] = max(dear, self.skipped.get(name, 0))
            wanted &= affordable
        return wanted.nonzero().squeeze(1)

    def towards(self, rows: Tensor, rank: int) -> Iterator[Run]:
        """Runs towards the part of this rank of each example, from random points; one for each goal among the parts."""
        x_adv = self.start(rows)
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
                yield Run(rows[mine], goal, refs[place[chosen[mine]], rows[mine]], x_adv[mine])

    @property
    def parts(self) -> int:
        """How many parts of the goal there are to pursue."""
        return self._order.shape[1]

    def start(self, rows: Tensor) -> Tensor:
        """Random points of the threat set, others at each call."""
        self._starts += 1
        return self.problem[rows].start(self._starts) if len(rows) else self.problem.x[rows]

    def run(self, runs: Sequence[Run], steps: int, reach: float = _REACH) -> None:
        """Descents, all of one goal at once; of each example the point that comes nearest is kept."""
        goals: list[Goal] = []
        for run in runs:
            goals += [] if run.goal in goals else [run.goal]
        for goal in goals:
            mine = [run for run in runs if run.goal == goal and len(run.rows)]
            if mine:
                some = self.problem[torch.cat([run.rows for run in mine])]
                some = some.following(goal, torch.cat([run.ref for run in mine]))
                points = descend(some, torch.cat([run.x_adv for run in mine]), steps, reach)
                for run in mine:
                    self.take(run.rows, points[: len(run.rows)])
                    points = points[len(run.rows) :]

    def search(self, rows: Tensor, queries: int, share: float) -> None:
        """Change windows at random from the nearest points, as Square does; the best of several is taken if it helps."""
        problem = self.problem
        self._starts += 1
        for query in range(queries // _AT_ONCE):
            rows = rows[problem.open[rows]]
            if not len(rows):
                return
            many = rows.repeat_interleave(_AT_ONCE)
            some, at = problem[many], self.nearest[many]
            noise = _each(some.noise("windows", self._starts, query), _AT_ONCE)
            candidate = moved(some.threat, at, some.x, share, noise)
            edge = told(some.goal.edge(some.answer(candidate), some.ref)).reshape(-1, _AT_ONCE)
            best = edge.argmin(1) + torch.arange(len(rows), device=rows.device) * _AT_ONCE
            self._keep(rows, candidate[best], edge.amin(1))

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


def _each(noise: Noise, copies: int) -> Noise:
    """Noise of its own for each copy of an example, copies side by side."""
    copy = torch.arange(copies, device=noise.ids.device).repeat(len(noise.ids) // copies)
    return replace(noise, ids=noise.ids * copies + copy)
