"""The state that the stages of the cascade share: the best point of each example, and the descents that improve it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from robustkit._engine.tensors import dot
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks._descent import BestPoint, cosine_decay, gradient_descent
from robustkit.attacks.fab import FAB, boundary_walk
from robustkit.attacks.standard.patch_search import search_patches
from robustkit.goals import Goal, Out
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Threat

__all__ = ["CascadeState", "DescentSpec", "descend"]

_MAX_PARTS = 9  # number of parts of the goal, likeliest first, that are ranked


def descend(problem: Problem, x_adv: Tensor, steps: int, reach: float | Tensor | None = None) -> Tensor:
    """The iterates of lowest loss of a gradient descent with a cosine schedule of step sizes, (N, *S).

    Each step is clamped to the box before it is projected onto the ball. In the other order, coordinates that point out of
    the box take part in the shrinking, so that each step gives back a part of its gain.

    Args:
        problem: The examples and the loss.
        x_adv: The first points, (N, *S).
        steps: Number of steps, each one forward and one backward pass.
        reach: The first step size in budgets: one number, or one per example, (N,). None for the default of the threat.
    """
    x, threat = problem.x, problem.threat
    first = _default_reach(threat) if reach is None else reach

    def update(step: int, x_adv: Tensor, grad: Tensor) -> Tensor:
        length = first * cosine_decay(step, steps) * threat.budget
        return threat.project(threat.clamp(threat.move(-grad, x_adv, x, length)), x)

    best = BestPoint(x_adv)
    gradient_descent(problem, x_adv, problem.steps(steps), update, best.update)
    return best.x_adv


def _default_reach(threat: Threat) -> float:
    """The first step size of a descent in budgets; the last one is close to zero."""
    return 3.0 if type(threat) is L2 else 2.0


class DescentSpec(NamedTuple):
    """A descent of some of the examples.

    Attributes:
        rows: Indices of the examples, (M,).
        goal: The goal whose loss is minimised.
        ref: Its reference, (M, ...).
        x_adv: The first points, (M, *S).
        reach: The first step size in budgets; None for the default of the threat.
    """

    rows: Tensor
    goal: Goal
    ref: Tensor
    x_adv: Tensor
    reach: float | None = None


@final
class CascadeState:
    """The best point of each example so far, and the order in which the parts of the goal are attacked.

    "Best" means the smallest boundary margin, and the ratio of this margin to that at x says how close an example is to being
    solved. The ratio belongs to the example, so the effort spent on it does not depend on the other examples.

    Attributes:
        problem: The examples.
        budget: The largest cost of an example in forward passes, a gradient counted as two; None for no limit.
        best: The best points, (N, *S); their `loss` is the boundary margin, (N,).
        clean_margin: The boundary margin at x, (N,); infinite before `first_pass`.
        skipped: The number of examples that could not afford a stage, by the name of the stage.
    """

    def __init__(self, problem: Problem, budget: int | None) -> None:
        self.problem, self.budget = problem, budget
        self.clean_margin = torch.full((len(problem),), torch.inf, device=problem.x.device)
        self.best = BestPoint(problem.x, self.clean_margin.clone())
        self.skipped: dict[str, int] = {}
        self._ranked = torch.zeros_like(problem.unsolved)
        self._parts: list[tuple[Goal, Tensor]] = []
        self._order = torch.zeros(len(problem), 0, dtype=torch.int64, device=problem.x.device)

    def first_pass(self) -> None:
        """Compute the boundary margins of the unsolved examples at x, and rank the parts of the goal.

        Parts are ranked by margin / gain, where the gain is that of the steepest point of the threat set on the linearised
        part: the smaller the ratio, the closer the part. Parts without a gradient come last, in the order of the goal.
        """
        rows, ratios = self.affordable_rows("first-pass", 1 + 2 * _MAX_PARTS), []
        if not len(rows):
            return
        examples = self.problem[rows]
        goal = examples.goal.with_surrogate_loss(margin)

        def margins(out: Out, ref: Tensor) -> Iterator[Tensor]:
            parts = goal.parts(out, ref)[:_MAX_PARTS]
            self._parts = [(part, _scatter_rows(part_ref, rows, self.problem.ref)) for part, part_ref in parts]
            self.clean_margin[rows] = goal.boundary_margin(out, ref).detach().to(self.clean_margin)
            return (part.boundary_margin(out, part_ref[rows]) for part, part_ref in self._parts)

        for part_margin, grad in examples.gradients(examples.x, margins):
            gain = dot(-grad, examples.threat.steepest(-grad, examples.x) - examples.x)
            ratios.append(torch.where(gain > 0, part_margin / gain, torch.inf))
        self._ranked[rows] = True
        self.best.update(self.problem.x, self.clean_margin)
        self._order = torch.zeros(len(self.problem), len(ratios), dtype=torch.int64, device=rows.device)
        self._order[rows] = torch.stack(ratios, 1).argsort(dim=1, stable=True)

    def affordable_rows(self, stage: str, cost: int, margin_ratio: float | None = None) -> Tensor:
        """The indices of the unsolved examples that can afford a stage; the number of the others is recorded.

        Args:
            stage: Name of the stage.
            cost: Its cost per example in forward passes, a gradient counted as two.
            margin_ratio: Only examples whose best margin is at most this share of their margin at x. None for all; otherwise
                examples left out of the first pass are left out here too.
        """
        problem, selected = self.problem, self.problem.unsolved
        if margin_ratio is not None:
            too_far = (self.best.loss > margin_ratio * self.clean_margin) & (self.clean_margin > 0)
            selected = selected & self._ranked & ~too_far
        if self.budget is not None:
            affordable = problem.cost + cost <= self.budget
            skipped = int((selected & ~affordable).sum())
            if skipped:
                self.skipped[stage] = max(skipped, self.skipped.get(stage, 0))
            selected = selected & affordable
        return selected.nonzero().squeeze(1)

    def descents_towards(self, rows: Tensor, rank: int | None, draw: int, reach_factor: float = 1.0) -> Iterator[DescentSpec]:
        """Descents from random points towards one part of the goal per example, one descent for each goal among the parts.

        Args:
            rows: Indices of the examples, (M,).
            rank: Rank of the part; None for the whole goal.
            draw: Number of the random start.
            reach_factor: Factor on the default first step size.
        """
        if not len(rows):
            return
        x_adv, reach = self.problem[rows].start(draw), reach_factor * _default_reach(self.problem.threat)
        if rank is None:
            yield DescentSpec(rows, self.problem.goal.with_surrogate_loss(margin), self.problem.ref[rows], x_adv, reach)
            return
        part = self._order[rows, rank]
        for goal, members in self._parts_by_goal():
            refs = torch.stack([self._parts[number][1] for number in members])
            position = torch.full((len(self._parts),), -1, device=rows.device)
            position[members] = torch.arange(len(members), device=rows.device)
            in_group = position[part] >= 0
            if in_group.any():
                ref = refs[position[part[in_group]], rows[in_group]]
                yield DescentSpec(rows[in_group], goal, ref, x_adv[in_group], reach)

    def _parts_by_goal(self) -> list[tuple[Goal, list[int]]]:
        """The numbers of the parts that share a goal and differ in the reference alone."""
        groups: list[tuple[Goal, list[int]]] = []
        for number, (goal, _) in enumerate(self._parts):
            same = next((members for known, members in groups if known == goal), None)
            if same is None:
                groups.append((goal, [number]))
            else:
                same.append(number)
        return groups

    @property
    def part_count(self) -> int:
        """Number of parts of the goal that were ranked."""
        return self._order.shape[1]

    def run_descents(self, specs: Sequence[DescentSpec], steps: int) -> None:
        """Run descents, those with the same goal in one batch, and update the best points."""
        for group in self._batches(specs):
            problem, x_adv = self._as_one_problem(group)
            default = _default_reach(problem.threat)
            reach = [torch.full((len(spec.rows),), default if spec.reach is None else spec.reach) for spec in group]
            self.update_best(group, descend(problem, x_adv, steps, torch.cat(reach).to(problem.x)))

    def run_boundary_walks(self, specs: Sequence[DescentSpec], steps: int) -> None:
        """Walk along the decision boundary from x; the points, projected onto the threat set, update the best points."""
        walks = [spec._replace(goal=DecisionBoundary(spec.goal)) for spec in specs]
        for group in self._batches(walks):
            problem, _ = self._as_one_problem(group)
            points, _ = boundary_walk(problem, steps, FAB())
            self.update_best(group, problem.threat.project(points, problem.x))

    def _batches(self, specs: Sequence[DescentSpec]) -> list[list[DescentSpec]]:
        """Groups of descents with the same goal that fit into one batch of the model."""
        groups: list[list[DescentSpec]] = []
        for spec in specs:
            same = next((group for group in groups if group[0].goal == spec.goal and self._fits(group, spec)), None)
            if same is not None:
                same.append(spec)
            elif len(spec.rows):
                groups.append([spec])
        return groups

    def _fits(self, group: Sequence[DescentSpec], spec: DescentSpec) -> bool:
        """Whether the group and one more descent fit into one batch of the model."""
        return sum(len(member.rows) for member in (*group, spec)) <= self.problem.batch_size

    def _as_one_problem(self, group: Sequence[DescentSpec]) -> tuple[Problem, Tensor]:
        """The examples of a group as one problem with the loss of its goal, and the first points."""
        problem = self.problem[torch.cat([spec.rows for spec in group])]
        x_adv = torch.cat([spec.x_adv for spec in group])
        return problem.with_surrogate_loss(group[0].goal, torch.cat([spec.ref for spec in group])), x_adv

    def update_best(self, group: Sequence[DescentSpec], points: Tensor) -> None:
        """Query the end points (M, *S) of a group of descents in one batch, and update the best points."""
        rows = torch.cat([spec.rows for spec in group])
        sizes = [len(spec.rows) for spec in group]
        margins = torch.split(self._boundary_margins(rows, points), sizes)
        for spec, x_adv, boundary_margin in zip(group, torch.split(points, sizes), margins, strict=True):
            self.best.update(x_adv, boundary_margin, spec.rows)

    def search_patches(self, rows: Tensor, queries: int, patch_share: float, draw: int) -> None:
        """Random search over square patches from the best points.

        An example that has not improved within half of the queries is given up: where gradients work, patches add nothing.
        """
        best = self.best[rows]
        search_patches(self.problem, rows, best, queries, patch_share, "windows", draw, patience=0.5)
        self.best.update(best.x_adv, best.loss, rows)

    def _boundary_margins(self, rows: Tensor, x_adv: Tensor) -> Tensor:
        """The boundary margins at points (M, *S) of the examples `rows` (M,), in one query; infinite for solved examples."""
        margins = torch.full((len(rows),), torch.inf, dtype=self.problem.x.dtype, device=rows.device)
        unsolved = self.problem.unsolved[rows].nonzero().squeeze(1)
        if len(unsolved):
            problem = self.problem[rows[unsolved]]
            margins[unsolved] = problem.goal.boundary_margin(problem.predict(x_adv[unsolved]), problem.ref).to(margins)
        return margins


def _scatter_rows(part_ref: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """The references of the examples `rows`, placed in a tensor with one row for each row of `like`; zero elsewhere."""
    placed = torch.zeros(len(like), *part_ref.shape[1:], dtype=part_ref.dtype, device=part_ref.device)
    return placed.index_copy(0, rows, part_ref)
