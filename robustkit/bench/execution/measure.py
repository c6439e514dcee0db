"""Attack the images of one block and evaluate the result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_generators
from robustkit.bench.execution.model_under_test import ModelUnderTest
from robustkit.bench.execution.pictures import make_pictures
from robustkit.bench.execution.resolved_case import ResolvedCase, keep_of
from robustkit.bench.execution.universal import LearnedPerturbation, PerturbationLearner, universal_stats
from robustkit.bench.execution.views import attack_every_view
from robustkit.bench.plan import plugins
from robustkit.bench.plan.plan import Plan
from robustkit.bench.results.block import Block, Task
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.data import Data
from robustkit.goals import Misclassify

__all__ = ["BlockMeasurer"]


@final
class BlockMeasurer:
    """Computes blocks.

    Args:
        plan: The plan.
        data: The images of the run.
        models: The models, by `Case.model_under_test`.
        learner: Learns universal perturbations.
    """

    def __init__(self, plan: Plan, data: Data, models: Mapping[str, ModelUnderTest], learner: PerturbationLearner) -> None:
        self._plan, self._data, self._models, self._learner = plan, data, models, learner

    def measure(self, task: Task, resolved: ResolvedCase, starts: Tensor | None) -> Block:
        """Compute a block.

        Args:
            task: The block.
            resolved: Its case.
            starts: Starting points for the attack, (n, *S), NaN where there is none; None if there are none at all.
        """
        plan, rows, model, attack = self._plan, task.rows, self._models[resolved.case.model_under_test], resolved.attack
        learned = self._learner.perturbation(resolved) if resolved.is_universal else None
        ids = torch.arange(task.first, task.last) + plan.offset
        started = time.perf_counter()
        correct, labels = model.correct(rows), self._data.y[rows]
        x, y = self._data.images(rows).to(plan.device), labels.to(plan.device)
        # A copy, because a model may write to its input.
        ref = resolved.goal_spec.ref(model.target.fn, x.clone(), y, model.target.batch_size)
        # Reseed generators that the model owns: their state depends on the blocks that this process did before.
        key = Noise(plan.seed, ids).at("model", int(ids[0])).key
        with fork_generators(model.target.generators, key), plugins.attribute_errors(resolved.plugin, resolved.case.attack):
            attack = attack if learned is None else learned.perturbation
            result = attack_every_view(
                attack,
                model.target,
                x,
                ref,
                goal=resolved.goal_spec.goal,
                threat=resolved.threat,
                seed=plan.seed,
                ids=ids,
                keep=keep_of(attack),
                starts=starts,
            )
        if resolved.goal_spec.goal == Misclassify():
            correct_after = ~result.success.cpu()
        else:
            correct_after = ~Misclassify().success(model.logits(result.x_adv, labels, rows.start, "after"), labels)
        is_first = task.first == self._learner.scored_images(resolved).start
        universal = None if learned is None else self._universal_stats(task, resolved, learned, x, result.x_adv, is_first)
        seconds = time.perf_counter() - started
        pictures = make_pictures(resolved, model, self._data, rows, result, correct, universal, plan.offset) if is_first else ()
        block = Block(task, result, ids, labels, correct, correct & correct_after.numpy(), seconds, pictures, universal)
        if plan.save_adversarial:
            return block
        # An empty tensor of its own: a view would keep the images in memory.
        kept_images = result.x_adv[block.perturbed].cpu()
        return replace(block, result=replace(result, x_adv=x.new_empty(len(x), 0)), kept_images=kept_images)

    def _universal_stats(
        self,
        task: Task,
        resolved: ResolvedCase,
        learned: LearnedPerturbation,
        x: Tensor,
        x_adv: Tensor,
        is_first: bool,
    ) -> UniversalStats:
        """The statistics of a universal perturbation; the first block of a case also has the perturbation itself."""
        model = self._models[resolved.case.model_under_test]
        others = [other for spec, other in self._models.items() if spec != resolved.case.model_under_test]
        labels = self._data.y[task.rows]
        stats = universal_stats(model, others, x, x_adv, labels, first=task.first, threat=resolved.threat, seed=self._plan.seed)
        if not is_first:
            return stats
        return replace(stats, delta=learned.perturbation.delta[0].cpu(), learned=learned.facts)
