"""The standard evaluation: the attack by which robustness should be measured."""

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
from robustkit.attacks.standard.cascade import CascadeState, DescentSpec
from robustkit.attacks.standard.escalation import escalate, reasons_to_escalate
from robustkit.errors import ArgumentError
from robustkit.flags import lower_bound
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["STAGES", "EffortLevel", "Standard"]

STAGES: Final = ("parts", "boundary", "patches", "refine", "restarts")
_ALL_PARTS: Final = 9
_AUDIT_COST: Final = 500  # the largest cost of the audit per example, in forward passes
_DRAWS: Final = 100  # random starts reserved for one effort level


@final
@dataclass(frozen=True)
class EffortLevel:
    """The attacks on examples whose best boundary margin is at most a given share of that at x.

    Attributes:
        margin_ratio: The share: the smaller, the closer the examples are to being solved, and the more is spent on each.
        steps: Number of steps of each descent.
        parts: Number of parts of the goal that are attacked, those of earlier levels included.
        refine_reaches: First step sizes, in budgets, of descents from the best point.
        restarts: Number of descents from random points, each of another variant.
        queries: Number of queries of the random search over patches, which comes before the descents.
        patch_share: The share of the image that a patch covers; smaller for closer examples, as in Square.
    """

    margin_ratio: float
    steps: int
    parts: int
    refine_reaches: tuple[float, ...] = ()
    restarts: int = 0
    queries: int = 0
    patch_share: float = 0.02


_LEVELS: Final = (
    EffortLevel(0.5, 20, 3, queries=150, patch_share=0.05),
    EffortLevel(0.15, 30, 5, (0.5, 0.1), 2, 300),
    EffortLevel(0.07, 40, _ALL_PARTS, (0.5, 0.1), 6, 600),
    EffortLevel(0.035, 50, _ALL_PARTS, (0.5, 0.1), 12, 1500),
)
# Sets of boundary walks, one after another: number of parts that are walked to, and steps of a walk.
_WALKS: Final = ((1, 20), (2, 40), (_ALL_PARTS, 80))
_MAX_MISSED: Final = 0.01  # the share of examples that descents may miss before a further set of walks is run
# Variants of restarts: rank of the part (None for the whole goal), and factor on the default first step size.
_RESTART_VARIANTS: Final = ((None, 1.0), (0, 0.5), (1, 1.0), (None, 0.5), (0, 1.0), (1, 0.5))


@final
@dataclass(frozen=True)
class Standard(Attack):
    """A cascade of attacks: each stage works on what earlier stages left unsolved, expensive ones on the closest examples only.

    1. "parts": descents on the margin of one part of the goal each (for misclassification: towards one other class), from
       random points, with a cosine schedule of step sizes; the likeliest parts first, ranked on a linear model at x
       ("first-pass").
    2. "boundary": a walk along the decision boundary from outside the ball, as in FAB; longer walks, towards more parts,
       where that solves more than 1 % of the examples that descents left unsolved.
    3. Four effort levels, each for examples that are closer to being solved, with more effort per example. "patches": the
       random search of Square, but from the best point, for as long as it improves. "parts": those not attacked yet.
       "restarts": descents from random points, each of another variant, and from the best point ("refine").

    How close an example is to being solved is measured by its own margins: the boundary margin at the best point as a share
    of that at x. So no constant depends on a data set, and no result on the other examples, except for the longer walks and
    the escalation, which are decided per batch; docs/standard.md shows what each stage contributes. The descents of a level
    share their batches, up to `Target.batch_size`.

    Attributes:
        steps: Number of steps of each descent on the first parts.
        parts: Number of parts of the goal that are attacked for every example.
        budget: The largest cost of an example in forward passes, a gradient counted as two; None for no limit. Stages that
            would exceed it are skipped, and a note says for how many examples. A target that averages gradients over several
            draws, or whose view is not the deployed function, costs more than estimated.
        skip: A stage to leave out, to measure what it contributes; "" for none. "refine" names the descents from the best
            point.
        audit: Check whether the result can be believed, and escalate where it cannot.

    Sources: one class after another: Gowal et al. 2019 (https://arxiv.org/abs/1910.09338); effort where the margin is small:
    Liu et al. 2022 (https://arxiv.org/abs/2203.05154); patches: Andriushchenko et al. 2020
    (https://arxiv.org/abs/1912.00049); boundary walks: Croce & Hein 2020 (https://arxiv.org/abs/1907.02044). The ranking of
    parts by a linear model, the search from the best point, the steps clamped to the box and the effort levels are ours.
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
        """The stages in order; returns the best points, (N, *S)."""
        state = CascadeState(problem, self.budget)
        with problem.stage("first-pass"):
            state.first_pass()
        attacked = 0
        for number, level in enumerate((EffortLevel(math.inf, self.steps, self.parts), *_LEVELS), start=1):
            ranks: list[int | None] = list(range(attacked, min(level.parts, state.part_count)))
            attacked += len(ranks)
            if number == 1 and state.part_count == 1 < self.parts:
                ranks.append(None)  # a goal with a single part gets a second descent from another start
            self._run_level(state, level, number, ranks)
            if number == 1:
                with problem.stage("boundary"):
                    self._run_boundary_walks(state)
        x_adv = self._audit(state) if self.audit else None
        for stage, skipped in state.skipped.items():
            problem.add_note("budget", f"budget={self.budget} is too small for {stage} on {skipped} examples")
        return state.best.x_adv if x_adv is None else x_adv

    def _audit(self, state: CascadeState) -> Tensor | None:
        """Run the audit and, without a budget, the escalation; returns the points of the latter, (N, *S), if it has any."""
        problem = state.problem
        with problem.stage("audit"):
            rows = None if self.budget is None else state.affordable_rows("audit", _AUDIT_COST)
            Audit().run(problem if rows is None else problem[rows])
        if self.budget is None:
            return escalate(problem)
        if reasons_to_escalate(problem):
            state.skipped["escalation"] = int(problem.unsolved.sum())
        return None

    def _run_level(self, state: CascadeState, level: EffortLevel, number: int, ranks: Sequence[int | None]) -> None:
        """Search patches, then run the descents of an effort level, towards the parts of these ranks among others."""
        with state.problem.stage("patches"):
            rows = state.affordable_rows("patches", level.queries, level.margin_ratio)
            state.search_patches(rows[:0] if self.skip == "patches" else rows, level.queries, level.patch_share, number)
        stage = "restarts" if level.restarts else "parts"
        with state.problem.stage(stage):
            counts = {"parts": len(ranks), "refine": len(level.refine_reaches), "restarts": level.restarts}
            counts.pop(self.skip, None)
            rows = state.affordable_rows(stage, sum(counts.values()) * _descent_cost(level.steps), level.margin_ratio)
            draws = count(_DRAWS * number)
            specs = [spec for kind in counts for spec in _descents(state, level, rows, kind, ranks, draws)]
            state.run_descents(specs, level.steps)

    def _run_boundary_walks(self, state: CascadeState) -> None:
        """Walk along the boundary of the likeliest part; walk further and to more parts while that solves many examples.

        Descents stay inside the ball, walks come from outside. They solve many examples that descents missed where the model
        is flat around x, and none elsewhere.
        """
        problem, productive = state.problem, 0
        for max_parts, steps in _WALKS if self.skip != "boundary" else ():
            ranks = range(min(max_parts, state.part_count))
            rows = state.affordable_rows("boundary", len(ranks) * _descent_cost(steps), math.inf)
            state.run_boundary_walks([spec for rank in ranks for spec in state.descents_towards(rows, rank, 0)], steps)
            if lower_bound(int((~problem.unsolved[rows]).sum()), len(rows)) <= _MAX_MISSED:
                break
            productive += 1
        problem.record_check("boundary-breaks", min(1, productive), 1)


def _descents(
    state: CascadeState, level: EffortLevel, rows: Tensor, kind: str, ranks: Sequence[int | None], draws: Iterator[int]
) -> Iterator[DescentSpec]:
    """The descents of an effort level of one kind: "parts", "refine" or "restarts"."""
    goal, ref = state.problem.goal.with_surrogate_loss(margin), state.problem.ref[rows]
    if kind == "parts":
        for rank in ranks:
            yield from state.descents_towards(rows, rank, next(draws))
    elif kind == "refine":
        yield from (DescentSpec(rows, goal, ref, state.best.x_adv[rows], reach) for reach in level.refine_reaches)
    else:
        for rank, reach_factor in islice(cycle(_RESTART_VARIANTS), level.restarts):
            rank = None if rank is None else min(rank, state.part_count - 1)
            yield from state.descents_towards(rows, rank, next(draws), reach_factor)


def _descent_cost(steps: int) -> int:
    """The cost of a descent in forward passes: a forward and a gradient, which counts as two, per step, and a final query."""
    return 3 * steps + 1
