"""Wrap our attacks in classes of foolbox, which are created only where foolbox is installed."""

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

__all__ = ["Recipe", "wrap_recipe"]

# Any in this file: foolbox is optional, so a type checker may not find its types.


@dataclass(frozen=True)
class Recipe:
    """The arguments of `to_foolbox`: what is run for each epsilon."""

    attack: Attack
    threat: Threat
    goal: Goal | None
    seed: int
    keep: Keep
    batch_size: int

    def run(self, fmodel: Any, x: Any, goal: Goal, ref: Any, epsilon: float) -> Tensor:
        """Return the adversarial images (N, *S); `goal` and `ref` are what foolbox's criterion stands for."""
        if not isinstance(x, Tensor) or not isinstance(ref, Tensor):
            raise ArgumentError(f"inputs are {type(x).__name__}, labels {type(ref).__name__}; both must be torch tensors")
        if epsilon == 0:
            return x.clone()
        if self.goal is not None and type(goal) is not type(self.goal):
            raise ArgumentError(
                f"goal={self.goal!r} does not match the criterion, which stands for {goal!r}; give a criterion of that kind"
            )
        threat = replace(self.threat, eps=float(epsilon), bounds=(float(fmodel.bounds.lower), float(fmodel.bounds.upper)))
        target = Target(fmodel, batch_size=self.batch_size)
        return self.attack(target, x, ref.long(), goal=self.goal or goal, threat=threat, seed=self.seed, keep=self.keep).x_adv


def wrap_recipe(fb: Any, recipe: Recipe) -> Any:
    """Wrap `recipe` as a foolbox attack of fixed epsilon."""
    base, ep = fb.attacks.base, import_module("eagerpy")

    class RobustkitAttack(fb.attacks.base.FixedEpsilonAttack):  # type: ignore[misc]
        distance = _distance(fb, ep, recipe.threat)

        def __init__(self, recipe: Recipe) -> None:
            self.recipe = recipe

        def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
            base.raise_if_kwargs(kwargs)
            x, restore = ep.astensor_(inputs)
            goal, ref = _goal_and_labels(fb, base.get_criterion(criterion))
            return restore(ep.astensor(self.recipe.run(model, x.raw, goal, ref, epsilon)))

        def repeat(self, times: int) -> Any:
            return RobustkitRepeated(self, times)

    class RobustkitRepeated(fb.attacks.base.Repeated):  # type: ignore[misc]
        def __call__(self, model: Any, inputs: Any, criterion: Any, *, epsilons: Any, **kwargs: Any) -> Any:
            # foolbox repeats the same attack object; for this call it is replaced by one that uses a new seed each time.
            seeds = count(self.attack.recipe.seed)

            def run_with_next_seed(*args: Any, **kwargs: Any) -> Any:
                return RobustkitAttack(replace(self.attack.recipe, seed=next(seeds)))(*args, **kwargs)

            run_with_next_seed.distance = self.distance  # type: ignore[attr-defined]
            return base.Repeated(run_with_next_seed, self.times)(model, inputs, criterion, epsilons=epsilons, **kwargs)

        def repeat(self, times: int) -> Any:
            return RobustkitRepeated(self.attack, self.times * times)

    return RobustkitAttack(recipe)


def _goal_and_labels(fb: Any, criterion: Any) -> tuple[Goal, Any]:
    """Return the goal that a criterion stands for, and the labels in it."""
    if type(criterion) is fb.criteria.Misclassification:
        return Misclassify(), criterion.labels.raw
    if type(criterion) is fb.criteria.TargetedMisclassification:
        return ClassifyAs(), criterion.target_classes.raw
    raise ArgumentError(f"criterion={criterion!r} has no loss; give labels, Misclassification or TargetedMisclassification")


def _distance(fb: Any, ep: Any, threat: Threat) -> Any:
    """Return foolbox's distance for `threat`; one that calls `threat.size` where foolbox has none."""
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
                return perturbed  # always true for results of our attacks
            raise ArgumentError(
                f"epsilon={epsilon} is exceeded, and {self!r} cannot shrink perturbations of other attacks; clip them first"
            )

    return Size()
