"""A universal attack in a run: learned on images of its own, then looked at on others, and on the other models."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from robustkit._random import Noise
from robustkit._world import reseeded
from robustkit.attacks.universal import Perturbation, UniversalAttack
from robustkit.bench.plan import Plan
from robustkit.bench.record import Record
from robustkit.bench.specs import Aim
from robustkit.bench.subject import Subject
from robustkit.data import Data
from robustkit.threats import Threat

__all__ = ["Learned", "Spread", "learn", "random_signs", "spread_facts"]

DRAWS = 3  # of random signs, the yardstick


@final
@dataclass(frozen=True, eq=False)
class Learned:
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
            "fooling_train": self.fooling, "images": self.images, "source": self.source, "seconds": self.seconds,
            "forwards": made.forwards, "backwards": made.backwards, "classes": self.classes,
            "alarms": [asdict(alarm) for alarm in made.alarms],
        }  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class Spread:
    """What a universal perturbation does to the predictions for the images of a block.

    Attributes:
        before: The classes that the model names without it, (n,) int64.
        after: The classes that it names with it, (n,) int64.
        random: The share of random-sign changes of the same budget that change the class, (n,) float64.
        elsewhere: For each other model of the run, whether its class changes, (n,) bool.
        delta: The change itself, (C, H, W) or whatever an input is; with the first block of a case only.
        learned: What is to be told of the learning; likewise.
    """

    before: Tensor
    after: Tensor
    random: Tensor
    elsewhere: Mapping[str, Tensor] = field(default_factory=dict)
    delta: Tensor | None = None
    learned: Mapping[str, Any] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is a tensor, by name, for a file."""
        held = {f"spread/{name}": getattr(self, name) for name in ("before", "after", "random")}
        held |= {} if self.delta is None else {"spread/delta": self.delta}
        return held | {f"elsewhere/{model}": fooled for model, fooled in self.elsewhere.items()}

    @classmethod
    def of(cls, held: Mapping[str, Tensor], learned: Mapping[str, Any] | None) -> Spread | None:
        """What `tensors` gave, or None where there is nothing of it."""
        if "spread/before" not in held:
            return None
        elsewhere = {name.removeprefix("elsewhere/"): held[name] for name in sorted(held) if name.startswith("elsewhere/")}
        before, after, random = (held[f"spread/{name}"] for name in ("before", "after", "random"))
        return cls(before, after, random, elsewhere, held.get("spread/delta"), learned)

    @classmethod
    def seen(cls, subject: Subject, others: Sequence[Subject], x: Tensor, x_adv: Tensor, y: Tensor, *, first: int,
             threat: Threat, seed: int) -> Spread:  # fmt: skip
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
        return cls(before, classes(subject, x_adv, "after"), random.double().mean(0), elsewhere)


def random_signs(threat: Threat, like: Tensor, seed: int, draw: int) -> Tensor:
    """A change of the whole budget that has learned nothing: random signs, all of one size, (1, *S)."""
    bits = Noise(seed, torch.tensor([draw])).at("random signs").bits(*like.shape[1:])
    return threat.free.steepest((bits & 1).to(like) * 2 - 1, torch.zeros_like(like))


def learn(attack: UniversalAttack, subject: Subject, aim: Aim, threat: Threat, pool: Data, plan: Plan) -> Learned:
    """Let an attack learn on all images of `pool`, and see how many of them it fools."""
    started = time.perf_counter()
    x, y = pool.x.to(plan.device), pool.y.to(plan.device)
    ref = aim.ref(subject.target.fn, x.clone(), y, subject.target.batch_size)  # a model may write to its input
    key = Noise(plan.seed, torch.arange(0)).at("model", "learning").key
    with reseeded(subject.target.generators, key):
        made = attack.learn(subject.target, x, ref, goal=aim.goal, threat=threat, seed=plan.seed)
    x_adv = threat.project(x + made.delta.to(x), x)
    before, after = (subject.logits(images, pool.y, 0, "learned").argmax(1) for images in (x, x_adv))
    seconds = time.perf_counter() - started
    return Learned(made, float((before != after).double().mean()), len(pool), pool.spec, seconds,
                   tuple(np.unique(pool.y.numpy()).tolist()))  # fmt: skip


def spread_facts(record: Record, spreads: Sequence[Spread], labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What a record tells of a universal attack besides: rates over all images of its blocks, in [0, 1], and the learning.

    `fooling_train` and `fooling_held_out` are the shares of predictions that change, right or wrong before, on the images
    that the change was learned on and on the others; `fooling_random` the same for random signs of the same budget;
    `collapse` the class into which most of the changed predictions fall, and their share of them; `transfer` the share of
    changed predictions of every other model of the run.
    """
    learned = next(spread.learned for spread in spreads if spread.learned is not None)
    before, after, random = (torch.cat([getattr(spread, name) for spread in spreads]) for name in ("before", "after", "random"))
    fooled = before != after
    into = np.bincount(after[fooled].numpy()) if fooled.any() else np.zeros(0, np.int64)
    most = int(into.argmax()) if len(into) else None
    held_out, yardstick = float(fooled.double().mean()), float(random.mean())
    why = (
        f"one change for all, learned on {learned['images']:,} images of {learned['source']}, none of those scored; it changes "
        f"{learned['fooling_train']:.1%} of the predictions there, {held_out:.1%} here; random signs {yardstick:.1%}"
    )
    return {
        "seconds": record["seconds"] + learned["seconds"],
        "forwards": record["forwards"] + learned["forwards"],
        "backwards": record["backwards"] + learned["backwards"],
        "flags": [*record["flags"], *learned["alarms"], *_other_classes(learned["classes"], labels)],
        "notes": [*record["notes"], {"name": "universal", "why": why}],
        "fooling_train": learned["fooling_train"],
        "fooling_held_out": held_out,
        "fooling_random": yardstick,
        "collapse": None if most is None else {
            "class": classes[most] if most < len(classes) else str(most),
            "share": float(into[most] / into.sum()),
        },
        "transfer": {
            model: float(torch.cat([spread.elsewhere[model] for spread in spreads]).double().mean())
            for model in spreads[0].elsewhere
        },
    }  # fmt: skip


def _other_classes(learned: Sequence[int], labels: Tensor) -> list[dict[str, str]]:
    """An alarm where images of some classes are scored that the change has never seen, as where data are sorted."""
    scored = set(np.unique(labels.numpy()).tolist())
    unseen = len(scored - set(learned))
    if not unseen:
        return []
    why = f"{unseen} of the {len(scored)} classes that are scored were not among the images it learned on; shuffle the data"
    return [{"name": "learned-on-other-classes", "why": why}]
