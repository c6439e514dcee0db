"""The blocks of a plan: their order, their names, and which block starts from which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from robustkit.bench.execution.block_names import block_name
from robustkit.bench.execution.resolved_case import ResolvedCase
from robustkit.bench.execution.sweeps import Sweeps
from robustkit.bench.execution.universal import PerturbationLearner
from robustkit.bench.plan.plan import Plan
from robustkit.bench.results.block import Task

__all__ = ["Schedule"]


@final
@dataclass(frozen=True, eq=False)
class Schedule:
    """The tasks of a run.

    Attributes:
        plan: The plan, with its hashes.
        cases: Its cases, resolved.
        learner: Knows which images a case is scored on, and which a universal attack learns from.
        fingerprints: The hash of the outputs of each model.
        environment: Versions and hardware.
        warm_starts: Hashes of the runs and files that attacks may start from.
    """

    plan: Plan
    cases: tuple[ResolvedCase, ...]
    learner: PerturbationLearner
    fingerprints: Mapping[str, str]
    environment: Mapping[str, Any]
    warm_starts: tuple[str, ...] = ()

    def tasks(self) -> list[Task]:
        """All blocks. The first block of every case comes first, because the remaining time is estimated from it."""
        images = [self.learner.scored_images(resolved) for resolved in self.cases]
        order = [(case, scored.start) for case, scored in enumerate(images)]
        order += [(case, first) for case, scored in enumerate(images) for first in scored[:: self.plan.block][1:]]
        return [self._task(case, first, min(first + self.plan.block, images[case].stop)) for case, first in order]

    def chains(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """Group tasks into chains: blocks of the same images in a sweep, in the order of eps."""
        chains: dict[tuple[Any, ...], list[Task]] = {}
        for task in tasks:
            chains.setdefault((*self._sweeps.key(task.case), task.first), []).append(task)
        return [tuple(sorted(chain, key=lambda task: self._sweeps.rank(task.case))) for chain in chains.values()]

    def lower_block(self, task: Task) -> Task | None:
        """The block of the same images under the next smaller eps, from which this one starts; None if there is none."""
        lower = self._sweeps.lower(task.case)
        return None if lower is None else self._task(lower, task.first, task.last)

    @cached_property
    def _sweeps(self) -> Sweeps:
        return Sweeps(self.cases)

    def _task(self, case: int, first: int, last: int) -> Task:
        resolved = self.cases[case]
        universal = resolved.is_universal
        lower = self.lower_block(Task(case, first, last, ""))
        name = block_name(
            resolved,
            self.plan,
            range(first, last),
            fingerprints=self.fingerprints,
            environment=self.environment,
            training_hash=self.learner.training_images.hash if universal else None,
            lower_block=None if lower is None else lower.name,
            warm_starts=() if universal else self.warm_starts,
        )
        return Task(case, first, last, name)
