"""Universal attacks in a run: a perturbation is learned on separate images, and applied to the scored ones and other models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robustkit import data as real_data
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_generators
from robustkit.attacks.universal import Perturbation, UniversalAttack
from robustkit.bench.execution.environment import torch_threads
from robustkit.bench.execution.model_under_test import ModelUnderTest
from robustkit.bench.execution.resolved_case import ResolvedCase
from robustkit.bench.plan import plugins
from robustkit.bench.plan.plan import Plan
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.data import Data
from robustkit.errors import ArgumentError
from robustkit.threats import Threat

__all__ = ["LearnedPerturbation", "PerturbationLearner", "random_signs", "universal_stats"]

DRAWS = 3  # random sign perturbations, as a baseline
MIN_TRAINING_IMAGES = 1000  # from a separate training part, or as many as are scored if that is more


@final
@dataclass(frozen=True, eq=False)
class LearnedPerturbation:
    """A learned universal perturbation.

    Attributes:
        perturbation: The perturbation and its costs.
        fooling: The fraction of the training images on which it changes the prediction.
        images: The number of training images.
        source: The spec of the training images.
        seconds: How long learning took.
        classes: The true classes among the training images.
    """

    perturbation: Perturbation
    fooling: float
    images: int
    source: str
    seconds: float
    classes: tuple[int, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but the perturbation itself, for a block file."""
        learned = self.perturbation
        return {
            "fooling_train": self.fooling,
            "images": self.images,
            "source": self.source,
            "seconds": self.seconds,
            "forwards": learned.forwards,
            "backwards": learned.backwards,
            "classes": self.classes,
            "flags": [asdict(flag) for flag in learned.own_flags],
        }


@final
class PerturbationLearner:
    """Learns the perturbations of the universal attacks of a run, each once per process.

    Args:
        plan: The plan.
        data: The images of the run.
        models: The models, by `Case.model_under_test`.
    """

    def __init__(self, plan: Plan, data: Data, models: Mapping[str, ModelUnderTest]) -> None:
        self._plan, self._data, self._models = plan, data, models
        self._learned: dict[Any, LearnedPerturbation] = {}

    def scored_images(self, resolved: ResolvedCase) -> range:
        """The images that a case is scored on: all, or the second half if a universal attack learns on the first."""
        split = resolved.is_universal and self._training_part is None
        return range(len(self._data) // 2 if split else 0, len(self._data))

    @cached_property
    def training_images(self) -> Data:
        """The images that universal attacks learn from: the training part of the data, or the first half of the data.

        Raises:
            ArgumentError: There is no training part, and only one image.
        """
        if len(self._data) < 2 and self._training_part is None:
            raise ArgumentError(
                f"data={self._plan.data!r}: a universal attack learns from the first half and is scored on the rest, and there "
                "is only one image; take more"
            )
        return self._training_part or self._data.part(0, len(self._data) // 2)

    @cached_property
    def _training_part(self) -> Data | None:
        part = real_data.training_part(self._plan.data)
        return part and part.part(0, max(MIN_TRAINING_IMAGES, len(self._data)))

    def perturbation(self, resolved: ResolvedCase) -> LearnedPerturbation:
        """The perturbation of a case, learned when it is first needed."""
        if resolved.case not in self._learned:
            self._learned[resolved.case] = self._learn(resolved, self.training_images)
        return self._learned[resolved.case]

    def try_out(self, resolved: ResolvedCase) -> None:
        """Learn on two images, so that errors such as a missing layer are raised before the run begins."""
        self._learn(resolved, self.training_images.part(0, 2))

    def _learn(self, resolved: ResolvedCase, training: Data) -> LearnedPerturbation:
        """Learn a perturbation, and measure on how many training images it changes the prediction."""
        assert isinstance(resolved.attack, UniversalAttack)
        with torch_threads(self._plan.threads), plugins.attribute_errors(resolved.plugin, resolved.case.attack):
            model, plan, threat = self._models[resolved.case.model_under_test], self._plan, resolved.threat
            started = time.perf_counter()
            x, y = training.x.to(plan.device), training.y.to(plan.device)
            # A copy, because a model may write to its input.
            ref = resolved.goal_spec.ref(model.target.fn, x.clone(), y, model.target.batch_size)
            key = Noise(plan.seed, torch.arange(0)).at("model", "learning").key
            with fork_generators(model.target.generators, key):
                learned = resolved.attack.learn(
                    model.target, x, ref, goal=resolved.goal_spec.goal, threat=threat, seed=plan.seed
                )
            x_adv = threat.project(x + learned.delta.to(x), x)
            before, after = (model.logits(images, training.y, 0, "learned").argmax(1) for images in (x, x_adv))
            seconds = time.perf_counter() - started
            fooling, classes = float((before != after).double().mean()), tuple(np.unique(training.y.numpy()).tolist())
            return LearnedPerturbation(learned, fooling, len(training), training.spec, seconds, classes)


def universal_stats(
    model: ModelUnderTest,
    others: Sequence[ModelUnderTest],
    x: Tensor,
    x_adv: Tensor,
    y: Tensor,
    *,
    first: int,
    threat: Threat,
    seed: int,
) -> UniversalStats:
    """Predictions with and without a universal perturbation, of the attacked model and of the others.

    Args:
        model: The model that the perturbation was learned on.
        others: The other models of the run.
        x: The images, (n, *S).
        x_adv: The perturbed images, (n, *S).
        y: The labels, (n,).
        first: The index in the data of the first image.
        threat: The threat, for the random sign perturbations.
        seed: The seed of the random signs.
    """

    def predict(predictor: ModelUnderTest, images: Tensor, purpose: str) -> Tensor:
        return predictor.logits(images, y, first, purpose).argmax(1)

    before = predict(model, x, "clean")
    signs = [random_signs(threat, x[:1], seed, draw) for draw in range(DRAWS)]
    random = torch.stack([predict(model, threat.project(x + delta, x), "random") != before for delta in signs])
    elsewhere = {other.spec: predict(other, x_adv, "transfer") != predict(other, x, "clean") for other in others}
    return UniversalStats(before, predict(model, x_adv, "after"), random.double().mean(0), elsewhere)


def random_signs(threat: Threat, like: Tensor, seed: int, draw: int) -> Tensor:
    """A perturbation of the full budget with random signs and equal magnitudes, (1, *S): a baseline without learning."""
    bits = Noise(seed, torch.tensor([draw])).at("random signs").bits(*like.shape[1:])
    return threat.free.steepest((bits & 1).to(like) * 2 - 1, torch.zeros_like(like))
