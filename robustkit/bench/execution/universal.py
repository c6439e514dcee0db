"""A universal attack in a run: learned on images of its own, then looked at on others, and on the other models."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_generators
from robustkit.attacks.universal import Perturbation, UniversalAttack
from robustkit.bench.execution.model_under_test import Subject
from robustkit.bench.plan.plan import Plan
from robustkit.bench.plan.specs import GoalSpec
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.data import Data
from robustkit.threats import Threat

__all__ = ["LearnedPerturbation", "learn", "random_signs", "universal_stats"]

DRAWS = 3  # of random signs, the yardstick


@final
@dataclass(frozen=True, eq=False)
class LearnedPerturbation:
    """A universal perturbation that is there.

    Attributes:
        perturbation: The change, and what it has cost.
        fooling: The share of predictions that it changes on the images that it was learned on.
        images: How many these were.
        source: Where they came from.
        seconds: How long it took.
        classes: Which true classes these images have.
    """

    perturbation: Perturbation
    fooling: float
    images: int
    source: str
    seconds: float
    classes: tuple[int, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """All but the change itself."""
        made = self.perturbation
        return {
            "fooling_train": self.fooling,
            "images": self.images,
            "source": self.source,
            "seconds": self.seconds,
            "forwards": made.forwards,
            "backwards": made.backwards,
            "classes": self.classes,
            "flags": [asdict(flag) for flag in made.own_flags],
        }


def universal_stats(
    subject: Subject, others: Sequence[Subject], x: Tensor, x_adv: Tensor, y: Tensor, *, first: int, threat: Threat, seed: int
) -> UniversalStats:
    """Ask the model under attack, and the others, about the images x (n, *S) and x_adv (n, *S).

    Args:
        subject: The model that the change was learned on.
        others: The other models of the run.
        x: The images.
        x_adv: The same with the change.
        y: Their labels, (n,).
        first: Which image of the data is the first.
        threat: The budget of the random signs.
        seed: Of the random signs.
    """

    def classes(one: Subject, images: Tensor, purpose: str) -> Tensor:
        return one.logits(images, y, first, purpose).argmax(1)

    before = classes(subject, x, "clean")
    drawn = [random_signs(threat, x[:1], seed, draw) for draw in range(DRAWS)]
    random = torch.stack([classes(subject, threat.project(x + delta, x), "random") != before for delta in drawn])
    elsewhere = {one.spec: classes(one, x_adv, "transfer") != classes(one, x, "clean") for one in others}
    return UniversalStats(before, classes(subject, x_adv, "after"), random.double().mean(0), elsewhere)


def random_signs(threat: Threat, like: Tensor, seed: int, draw: int) -> Tensor:
    """A change of the whole budget that has learned nothing: random signs, all of one size, (1, *S)."""
    bits = Noise(seed, torch.tensor([draw])).at("random signs").bits(*like.shape[1:])
    return threat.free.steepest((bits & 1).to(like) * 2 - 1, torch.zeros_like(like))


def learn(
    attack: UniversalAttack, subject: Subject, aim: GoalSpec, threat: Threat, pool: Data, plan: Plan
) -> LearnedPerturbation:
    """Let an attack learn on all images of `pool`, and see how many of them it fools."""
    started = time.perf_counter()
    x, y = pool.x.to(plan.device), pool.y.to(plan.device)
    ref = aim.ref(subject.target.fn, x.clone(), y, subject.target.batch_size)  # a model may write to its input
    key = Noise(plan.seed, torch.arange(0)).at("model", "learning").key
    with fork_generators(subject.target.generators, key):
        made = attack.learn(subject.target, x, ref, goal=aim.goal, threat=threat, seed=plan.seed)
    x_adv = threat.project(x + made.delta.to(x), x)
    before, after = (subject.logits(images, pool.y, 0, "learned").argmax(1) for images in (x, x_adv))
    seconds = time.perf_counter() - started
    return LearnedPerturbation(
        made, float((before != after).double().mean()), len(pool), pool.spec, seconds, tuple(np.unique(pool.y.numpy()).tolist())
    )
