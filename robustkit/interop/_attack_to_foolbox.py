"""One of our attacks in the shape of a foolbox attack; the classes are made only where foolbox is installed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from itertools import count
from typing import Any

from torch import Tensor

from robustkit._engine.best_so_far import Keep
from robustkit.attack import Attack
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify
from robustkit.target import Target
from robustkit.threats import L1, L2, Linf, Threat

__all__ = ["Recipe", "adapted"]

# Any in this file: what belongs to foolbox, which is optional, so a type checker may not find it.


@dataclass(frozen=True)
class Recipe:
    """What is run for each epsilon; see `to_foolbox`."""

    attack: Attack
    threat: Threat
    goal: Goal | None
    seed: int
    keep: Keep
    batch_size: int

    def solve(self, fmodel: Any, x: Any, asked: tuple[Goal, Any], epsilon: float) -> Tensor:
        """The adversarial images of one call of foolbox; `asked` is what its criterion means."""
        goal, ref = asked
        if not isinstance(x, Tensor) or not isinstance(ref, Tensor):
            raise ArgumentError(f"inputs are {type(x).__name__}, labels {type(ref).__name__}; both must be torch tensors")
        if epsilon == 0:
            return x.clone()
        if self.goal is not None and type(goal) is not type(self.goal):
            raise ArgumentError(f"goal={self.goal!r} does not go with the criterion, which means {goal!r}")
        threat = replace(self.threat, eps=float(epsilon), bounds=(float(fmodel.bounds.lower), float(fmodel.bounds.upper)))
        target = Target(fmodel, batch_size=self.batch_size)
        return self.attack(target, x, ref.long(), goal=self.goal or goal, threat=threat, seed=self.seed, keep=self.keep).x_adv


def adapted(fb: Any, recipe: Recipe) -> Any:
    """`recipe` as an instance of a class that exists only where foolbox does."""
    base, ep = fb.attacks.base, import_module("eagerpy")

    class RobustkitAttack(fb.attacks.base.FixedEpsilonAttack):  # type: ignore[misc]
        distance = _distance(fb, ep, recipe.threat)

        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe

        def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
            base.raise_if_kwargs(kwargs)
            x, restore = ep.astensor_(inputs)
            asked = _goal(fb, base.get_criterion(criterion))
            return restore(ep.astensor(self.recipe.solve(model, x.raw, asked, epsilon)))

        def repeat(self, times: int) -> Any:
            return RobustkitRepeated(self, times)

    class RobustkitRepeated(fb.attacks.base.Repeated):  # type: ignore[misc]
        def __call__(self, model: Any, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
            # foolbox calls the very same attack again and again. Here one that counts takes its place, for this call only.
            seeds = count(self.attack.recipe.seed)

            def draw(*args: Any, **kwargs: Any) -> Any:
                return RobustkitAttack(replace(self.attack.recipe, seed=next(seeds)))(*args, **kwargs)

            draw.distance = self.distance  # type: ignore[attr-defined]
            return base.Repeated(draw, self.times)(model, inputs, criterion, epsilons=epsilons, **kwargs)

        def repeat(self, times: int) -> Any:
            return RobustkitRepeated(self.attack, self.times * times)

    return RobustkitAttack(recipe)


def _goal(fb: Any, criterion: Any) -> tuple[Goal, Any]:
    """What a criterion means, and the labels in it."""
    if type(criterion) is fb.criteria.Misclassification:
        return Misclassify(), criterion.labels.raw
    if type(criterion) is fb.criteria.TargetedMisclassification:
        return ClassifyAs(), criterion.target_classes.raw
    raise ArgumentError(
        f"criterion={criterion!r} has no loss to follow; give labels, Misclassification or TargetedMisclassification"
    )


def _distance(fb: Any, ep: Any, threat: Threat) -> Any:
    """foolbox's distance that measures what `threat` limits; made of the threat itself where foolbox has none."""
    for kind, distance in ((Linf, fb.distances.linf), (L2, fb.distances.l2), (L1, fb.distances.l1)):
        if type(threat) is kind:
            return distance

    class Size(fb.distances.Distance):  # type: ignore[misc]
        def __repr__(self) -> str:
            return f"Size({type(threat).__name__})"

        def __call__(self, references: Any, perturbed: Any) -> Any:
            (x, x_adv), restore = ep.astensors_(references, perturbed)
            return restore(ep.astensor(threat.size(x_adv.raw, x.raw).to(x.raw.dtype)))

        def clip_perturbation(self, references: Any, perturbed: Any, epsilon: float) -> Any:
            (x, x_adv), _ = ep.astensors_(references, perturbed)
            if bool((threat.size(x_adv.raw, x.raw) <= epsilon + threat.slack(x.raw)).all()):
                return perturbed  # as everything is that comes from our attacks
            raise ArgumentError(f"epsilon={epsilon} is exceeded, and {self!r} cannot shrink a change that was made elsewhere")

    return Size()
