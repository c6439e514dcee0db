"""How near each example has come to the goal, and runs that bring it nearer: what the stages of a cascade share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from robustkit._engine.tensors import dot, expand_rows
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._cosine import cosine
from robustkit.attacks.fab import FAB, boundary_walk
from robustkit.attacks.standard.patch_search import search
from robustkit.goals import Goal, Out
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Threat

__all__ = ["CascadeState", "Run", "descend"]

_PARTS = 9  # of a goal, the likeliest ones, are looked at


def descend(problem: Problem, x_adv: Tensor, steps: int, reach: float | Tensor | None = None) -> Tensor:
    """Of the iterates of gradient descent with steps that shrink like a cosine, the one of lowest loss.

    Each step is cut to the box before it is brought into the ball. The other way round, what points out of the box takes part
    in the shrinking, so that each step gives back some of what was won.

    Args:
        problem: What to descend on.
        x_adv: Where to begin, (N, *S).
        steps: How many.
        reach: The first step in budgets; one number, or one an example, (N,). None for what suits the threat.

    Returns:
        Shape (N, *S).
    """
    x, threat = problem.x, problem.threat
    reach = _reach(threat) if reach is None else reach
    best, lowest = x_adv, torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for step in problem.steps(steps):
        loss, grad = problem.loss_and_grad(x_adv)
        lower = loss < lowest
        best, lowest = torch.where(expand_rows(lower, x), x_adv, best), torch.where(lower, loss, lowest)
        length = reach * cosine(step, steps) * threat.budget
        x_adv = threat.project(threat.clamp(threat.move(-grad, x_adv, x, length)), x)
    return best


def _reach(threat: Threat) -> float:
    """The first step of a descent in budgets that suits a threat; the last is next to nothing."""
    return 3.0 if type(threat) is L2 else 2.0


class Run(NamedTuple):
    """A descent that is wanted.

    Attributes:
        rows: For which examples, (M,).
        goal: Along which goal.
        ref: With which reference, (M, ...).
        x_adv: From where, (M, *S).
        reach: With which first step, in budgets; None for what suits the threat.
    """

    rows: Tensor
    goal: Goal
    ref: Tensor
    x_adv: Tensor
    reach: float | None = None


@final
class CascadeState:
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
        self.nearest, self.boundary_margin = problem.x, torch.full((len(problem),), torch.inf, device=problem.x.device)
        self.clean, self._seen = self.boundary_margin.clone(), torch.zeros_like(problem.unsolved)
        self.skipped: dict[str, int] = {}
        self._parts: list[tuple[Goal, Tensor]] = []
        self._order = torch.zeros(len(problem), 0, dtype=torch.int64, device=problem.x.device)

    def look(self) -> None:
        """Take the edges of the open examples at x, and order the parts of the goal.

        They come in the order of how much of its edge a linear model would leave of each.

        The budget takes from an edge at most what the steepest point of the threat set gains. Parts without any gradient come
        last, in the order in which the goal names them.
        """
        rows, found = self.rows("first-pass", 1 + 2 * _PARTS), []
        if not len(rows):
            return
        some = self.problem[rows]
        goal = some.goal.with_surrogate(margin)

        def edges(out: Out, ref: Tensor) -> Iterator[Tensor]:
            self._parts = [(part, _spread(wanted, rows, self.problem.ref)) for part, wanted in goal.parts(out, ref)[:_PARTS]]
            self.clean[rows] = goal.boundary_margin(out, ref).detach().to(self.clean)
            return (part.boundary_margin(out, wanted[rows]) for part, wanted in self._parts)

        for edge, grad in some.gradients(some.x, edges):
            gain = dot(-grad, some.threat.steepest(-grad, some.x) - some.x)
            found.append(torch.where(gain > 0, edge / gain, torch.inf))
        self._seen[rows] = True
        closer = self._seen & (self.clean < self.boundary_margin)
        self.nearest = torch.where(expand_rows(closer, self.nearest), self.problem.x, self.nearest)
        self.boundary_margin = torch.where(closer, self.clean, self.boundary_margin)
        self._order = torch.zeros(len(self.problem), len(found), dtype=torch.int64, device=rows.device)
        self._order[rows] = torch.stack(found, 1).argsort(dim=1, stable=True)

    def rows(self, name: str, cost: int, within: float | None = None) -> Tensor:
        """The open examples that can pay for a stage, as indices.

        `within` a share of their first edge they must have come, where one is given; who has not been looked at has not.
        """
        problem, wanted = self.problem, self.problem.unsolved
        if within is not None:
            hopeless = (self.boundary_margin > within * self.clean) & (self.clean > 0)
            wanted = wanted & self._seen & ~hopeless
        if self.budget is not None:
            affordable = problem.cost + cost <= self.budget
            dear = int((wanted & ~affordable).sum())
            if dear:
                self.skipped[name] = max(dear, self.skipped.get(name, 0))
            wanted = wanted & affordable
        return wanted.nonzero().squeeze(1)

    def towards(self, rows: Tensor, rank: int | None, draw: int, share: float = 1.0) -> Iterator[Run]:
        """Runs from random points towards the part of this rank of each example, one for each goal among the parts.

        `rank` None is the whole goal; the first step is a `share` of the usual one.
        """
        if not len(rows):
            return
        x_adv, reach = self.start(rows, draw), share * _reach(self.problem.threat)
        if rank is None:
            yield Run(rows, self.problem.goal.with_surrogate(margin), self.problem.ref[rows], x_adv, reach)
            return
        chosen = self._order[rows, rank]
        groups: list[tuple[Goal, list[int]]] = []
        for number, (goal, _) in enumerate(self._parts):
            same = next((members for known, members in groups if known == goal), None)
            if same is None:
                groups.append((goal, [number]))
            else:
                same.append(number)
        for goal, members in groups:
            refs = torch.stack([self._parts[number][1] for number in members])
            place = torch.full((len(self._parts),), -1, device=rows.device)
            place[members] = torch.arange(len(members), device=rows.device)
            mine = place[chosen] >= 0
            if mine.any():
                yield Run(rows[mine], goal, refs[place[chosen[mine]], rows[mine]], x_adv[mine], reach)

    @property
    def parts(self) -> int:
        """How many parts of the goal there are to pursue."""
        return self._order.shape[1]

    def start(self, rows: Tensor, draw: int) -> Tensor:
        """Random points of the threat set; draws are numbered, so that none repeats."""
        return self.problem[rows].start(draw)

    def run(self, runs: Sequence[Run], steps: int) -> None:
        """Descents, those of one goal side by side; of each example the point that comes nearest is kept."""
        for group in self._side_by_side(runs):
            some, x_adv = self._joined(group)
            usual = _reach(some.threat)
            reach = [torch.full((len(run.rows),), usual if run.reach is None else run.reach) for run in group]
            self.take(group, descend(some, x_adv, steps, torch.cat(reach).to(some.x)))

    def walk(self, runs: Sequence[Run], steps: int) -> None:
        """Walks along the border, from x; where one has come beyond it, its nearest point is brought into the threat set."""
        border = [run._replace(goal=DecisionBoundary(run.goal)) for run in runs]
        for group in self._side_by_side(border):
            some, _ = self._joined(group)
            points, _ = boundary_walk(some, steps, FAB())
            self.take(group, some.threat.project(points, some.x))

    def _side_by_side(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Runs of one goal that may go through the model together."""
        groups: list[list[Run]] = []
        for run in runs:
            same = next((group for group in groups if group[0].goal == run.goal and self._fits(group, run)), None)
            if same is not None:
                same.append(run)
            elif len(run.rows):
                groups.append([run])
        return groups

    def _fits(self, group: Sequence[Run], run: Run) -> bool:
        """Whether as many images may go through the model at once."""
        return sum(len(one.rows) for one in (*group, run)) <= self.problem.batch_size

    def _joined(self, group: Sequence[Run]) -> tuple[Problem, Tensor]:
        """The examples of a group as one problem that follows their goal, and where they begin."""
        some = self.problem[torch.cat([run.rows for run in group])]
        x_adv = torch.cat([run.x_adv for run in group])
        return some.with_surrogate(group[0].goal, torch.cat([run.ref for run in group])), x_adv

    def take(self, group: Sequence[Run], points: Tensor) -> None:
        """Ask at the points (M, *S) that runs have come to, all at once, and keep of each example the nearest."""
        rows = torch.cat([run.rows for run in group])
        sizes = [len(run.rows) for run in group]
        for run, found, edge in zip(
            group, torch.split(points, sizes), torch.split(self._edges(rows, points), sizes), strict=True
        ):
            self._keep(run.rows, found, edge)

    def search(self, rows: Tensor, queries: int, share: float, draw: int) -> None:
        """Change windows at random from the nearest points; who has gained nothing by half of the queries is let go.

        Where gradients work, windows have nothing to add.
        """
        near = self.nearest[rows], self.boundary_margin[rows]
        self._keep(rows, *search(self.problem, rows, near, queries, share, "windows", draw, patience=0.5))

    def _edges(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """The edges at points (M, *S) of the examples `rows` (M,), which are asked about all at once; infinite where solved."""
        edges = torch.full((len(rows),), torch.inf, dtype=self.problem.x.dtype, device=rows.device)
        left = self.problem.unsolved[rows].nonzero().squeeze(1)
        if len(left):
            some = self.problem[rows[left]]
            edges[left] = some.goal.boundary_margin(some.predict(x_adv[left]), some.ref).to(edges)
        return edges

    def _keep(self, rows: Tensor, x_adv: Tensor, edge: Tensor) -> None:
        nearer = edge < self.boundary_margin[rows]
        self.nearest = self.nearest.index_copy(0, rows, torch.where(expand_rows(nearer, x_adv), x_adv, self.nearest[rows]))
        self.boundary_margin[rows] = torch.where(nearer, edge.to(self.boundary_margin), self.boundary_margin[rows])


def _spread(wanted: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """References of the examples `rows` in a tensor with a row for each of all examples."""
    return torch.zeros(len(like), *wanted.shape[1:], dtype=wanted.dtype, device=wanted.device).index_copy(0, rows, wanted)
