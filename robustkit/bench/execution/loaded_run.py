"""A plan with its data and models in memory. It can compute any block, in any order and in any process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from robustkit import data as real_data
from robustkit.bench.execution.environment import environment, torch_threads
from robustkit.bench.execution.measure import BlockMeasurer
from robustkit.bench.execution.model_under_test import ModelUnderTest, load_models_under_test
from robustkit.bench.execution.resolved_case import ResolvedCase, resolve
from robustkit.bench.execution.schedule import Schedule
from robustkit.bench.execution.universal import PerturbationLearner
from robustkit.bench.execution.views import views_used
from robustkit.bench.execution.warm_starts import WarmStarts, read_warm_starts
from robustkit.bench.plan import plugins, specs
from robustkit.bench.plan.defence_specs import defence_recipe
from robustkit.bench.plan.hashes import check_hashes
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.request import command_of
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.record import Record
from robustkit.bench.results.store import Store
from robustkit.data import Data

__all__ = ["LoadedRun", "load"]

MAX_STORED_BYTES = 2**30  # larger cases store adversarial images only if the plan asks for them


def load(plan: Plan) -> LoadedRun:
    """Load everything that a plan names. Errors that can be found without an attack are raised here.

    Raises:
        ArgumentError: A spec is invalid, data or weights cannot be read or differ from the hashes of the plan, or a model
            fails on the data.
        MissingExtraError: An optional dependency is missing.
    """
    cases = resolve(plan.cases)
    with torch_threads(plan.threads):
        whole = real_data.load(plan.data)
        data = whole.part(plan.offset, plan.limit)
        warm_starts = read_warm_starts(plan.start_from, whole, range(plan.offset, plan.offset + len(data)))
        return LoadedRun(plan, data, load_models_under_test(data, plan), cases, warm_starts=warm_starts)


@final
class LoadedRun:
    """A plan that can be run.

    Args:
        plan: The plan; if it has hashes, data, models and warm starts must match them.
        data: The images.
        models: The models, by `Case.model_under_test`.
        cases: The cases of the plan, resolved.
        command: The command that repeats the run; by default the command line for the plan.
        warm_starts: Adversarial images from earlier runs and from files.

    Attributes:
        plan: The plan, with the hashes of what was loaded.
        cases: Its cases, resolved.
        weight_hashes: The hash of the weights of each model.
        fingerprints: The hash of the weights and outputs of each model.
        environment: Versions and hardware.
        command: The command that repeats the run.
        schedule: Its blocks.

    Raises:
        ArgumentError: A hash differs from that of the plan, or a case cannot be run on its model and data.
    """

    def __init__(
        self,
        plan: Plan,
        data: Data,
        models: Mapping[str, ModelUnderTest],
        cases: Sequence[ResolvedCase],
        command: str | None = None,
        warm_starts: WarmStarts = WarmStarts(),
    ) -> None:
        hashes = {spec: model.signature for spec, model in models.items()} | {plan.data: data.hash} | dict(warm_starts.hashes)
        check_hashes(hashes, plan.expected_hashes)
        _check_cases(cases, models)
        self.weight_hashes = {spec: model.hash for spec, model in models.items()}
        self.fingerprints = {spec: model.fingerprint for spec, model in models.items()}
        self.plan, self.cases = replace(plan, expected_hashes=hashes), tuple(cases)
        self.environment = environment(plan.device, plan.threads) | specs.plugin_packages(case.attack for case in plan.cases)
        self.command = command_of(plan) if command is None else command
        self._data, self._models, self._warm_starts = data, models, warm_starts
        self._learner = PerturbationLearner(self.plan, data, models)
        self._measurer = BlockMeasurer(self.plan, data, models, self._learner)
        self.schedule = Schedule(
            self.plan, self.cases, self._learner, self.fingerprints, self.environment, tuple(warm_starts.hashes.values())
        )
        self._recent: dict[Task, Block] = {}  # blocks of the current chain, from which later ones start
        for resolved in self.cases:
            if resolved.is_universal:
                self._learner.try_out(resolved)

    def __len__(self) -> int:
        """The number of images."""
        return len(self._data)

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class."""
        return self._data.classes

    def labels(self, case: int) -> Tensor:
        """The true classes of the images of a case, (n,) int64."""
        return self._data.y[self.images(case).start :]

    def images(self, case: int) -> range:
        """The images that a case is scored on: all, or those that a universal attack does not learn from."""
        return self._learner.scored_images(self.cases[case])

    def target_facts(self, case: int) -> Record:
        """The entries of a record about the target of a case: its defence with every field, and the views attacked."""
        resolved = self.cases[case]
        target = self._models[resolved.case.model_under_test].target
        return {"defence_recipe": defence_recipe(target), "views": list(views_used(resolved.attack, target))}

    def tasks(self) -> list[Task]:
        """All blocks, in the order of the schedule."""
        return self.schedule.tasks()

    def seconds_per_image(self, model_under_test: str) -> float:
        """The time that a model (by `Case.model_under_test`) takes per clean image, measured on the first block."""
        model, rows = self._models[model_under_test], slice(0, min(self.plan.block, len(self)))
        x, y = self._data.images(rows), self._data.y[rows]
        with torch_threads(self.plan.threads):
            started = time.perf_counter()
            model.logits(x, y, 0, "glance")
            return (time.perf_counter() - started) / len(x)

    def measure(self, task: Task) -> Block:
        """Compute a block."""
        with torch_threads(self.plan.threads):
            return self._measure(task)

    def measure_chain(self, tasks: Sequence[Task], store: Store | None = None) -> list[Block]:
        """Compute the blocks of a chain. A block that they start from is in the chain, in the store, or computed again."""
        try:
            for task in tasks:
                lower = self.schedule.lower_block(task)
                if store is not None and lower is not None and lower not in self._recent:
                    stored = store.get(lower)
                    if stored is not None:
                        self._recent[lower] = stored
                self._recent[task] = self.measure(task)
            blocks = [self._recent[task] for task in tasks]
            fits = 4 * self._data.shape.numel() <= MAX_STORED_BYTES  # float32
            return blocks if fits else [replace(block, kept_images=None) for block in blocks]
        finally:
            self._recent = {}

    def _measure(self, task: Task) -> Block:
        resolved = self.cases[task.case]
        return self._measurer.measure(task, resolved, None if resolved.is_universal else self._starting_points(task))

    def _starting_points(self, task: Task) -> Tensor | None:
        """The starting points of a block, (n, *S), NaN where there is none; None if there are none at all.

        These are the successes under the next smaller eps, and the best warm starts of the other images.
        """
        resolved, lower = self.cases[task.case], self.schedule.lower_block(task)
        if lower is None and not self._warm_starts.hashes:
            return None
        x, ids = self._data.images(task.rows), torch.arange(task.first, task.last) + self.plan.offset
        signature = self.plan.expected_hashes[resolved.case.model_under_test]
        starts = self._warm_starts.starting_points(resolved.case.goal, resolved.threat, signature, ids, x)
        if lower is not None:
            block = self._recent.get(lower)
            if block is None or block.adversarial is None:
                block = self._measure(lower)
            assert block.adversarial is not None
            success = block.result.success.cpu()
            starts[success] = x[success]  # those that need no perturbation
            starts[block.perturbed.cpu()] = block.adversarial.to(starts)
        return None if starts.isnan().all() else starts


def _check_cases(cases: Sequence[ResolvedCase], models: Mapping[str, ModelUnderTest]) -> None:
    for resolved in cases:
        case, attack = resolved.case, resolved.attack
        with plugins.attribute_errors(resolved.plugin, case.attack):
            specs.check_served(case.attack, attack, case.threat, resolved.threat)
        models[case.model_under_test].check(case, resolved.threat, resolved.goal_spec.target_class, attack.access == "white")
