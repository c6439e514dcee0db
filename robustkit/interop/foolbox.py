"""Attacks of foolbox under our interface, and ours under foolbox's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from robustkit._engine.best_so_far import Keep, check_keep
from robustkit.attack import Attack
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify
from robustkit.interop._attack_to_foolbox import Recipe, adapted
from robustkit.interop._problem_module import ProblemModule, by_budget, finite
from robustkit.interop.peers import load_foolbox
from robustkit.problem import Problem
from robustkit.threats import L1, L2, Linf, Pixels, Threat

if TYPE_CHECKING:
    from foolbox.attacks.base import FixedEpsilonAttack

__all__ = ["FoolboxAttack", "from_foolbox", "to_foolbox"]

# Any in this file: what belongs to foolbox, which is optional, so a type checker may not find it.

_NORMS: dict[type[Threat], float] = {Linf: torch.inf, L2: 2, L1: 1, Pixels: 0}


def to_foolbox(
    attack: Attack, *, threat: Threat, goal: Goal | None = None, seed: int = 0, keep: Keep = "first", batch_size: int = 128
) -> FixedEpsilonAttack:
    """One of our attacks as a foolbox attack: `to_foolbox(PGD(), threat=Linf(8 / 255))(fmodel, x, y, epsilons=[...])`.

    Labels and the criterion `Misclassification` mean the goal `Misclassify()`, `TargetedMisclassification` means
    `ClassifyAs()`; other criteria have no gradient and are refused. `.repeat(n)` draws anew each time: repeat i of a call
    is what the seed `seed + i` gives, so equal calls give equal results; give seeds that are more than n apart to
    attacks that shall share no draw. The model's mode is left to foolbox, which asks for `model.eval()`.

    Args:
        attack: The attack.
        threat: The kind of change. Its eps is replaced by each of foolbox's epsilons, its bounds by the model's. Linf, L2
            and L1 go with foolbox's distances of these names; every other threat brings its own size as distance, since
            foolbox's l0 counts values where `Pixels` counts locations.
        goal: `Misclassify` or `ClassifyAs` with a surrogate other than cross-entropy; the criterion must be of that kind.
        seed: Any integer.
        keep: Which iterate comes back; "last" compares with foolbox's own attacks.
        batch_size: The most images that go through the model at once.

    Returns:
        A `foolbox.attacks.base.FixedEpsilonAttack`. An epsilon of zero gives the inputs back.

    Raises:
        ArgumentError: A value outside its range.
        MissingExtraError: foolbox is not installed.
    """
    if not isinstance(attack, Attack) or not isinstance(threat, Threat):
        raise ArgumentError(f"attack={attack!r} and threat={threat!r} must be ours, such as PGD() and Linf(8 / 255)")
    if not isinstance(goal, Misclassify | ClassifyAs | None):
        raise ArgumentError(f"goal={goal!r} must be Misclassify(...) or ClassifyAs(...): foolbox's criteria know no other")
    check_keep(keep)
    adapter: FixedEpsilonAttack = adapted(load_foolbox(), Recipe(attack, threat, goal, seed, keep, batch_size))
    return adapter


def from_foolbox(attack: Any, *, early_stop: bool = True) -> FoolboxAttack:
    """A foolbox attack as one of ours: `from_foolbox(foolbox.attacks.LinfPGD(steps=40))(model, x, y, threat=Linf(0.1))`.

    foolbox's answer counts for nothing by itself: it is brought into the threat and judged anew, so an attack that
    reports black images as successes reports nothing here. With `keep="last"` that answer is what comes back; otherwise
    the images that it tries on the way compete too. Its random numbers belong to the batch, not to the example: results
    repeat for the same seed and micro-batches, but change with the size of these.

    Args:
        attack: An instance, of fixed epsilon or minimum norm, repeated or not.
        early_stop: Whether a minimum-norm attack may end once it is inside the budget everywhere; False searches on.

    Raises:
        ArgumentError: `attack` is no foolbox attack.
        MissingExtraError: foolbox is not installed.
    """
    if not isinstance(attack, load_foolbox().attacks.base.Attack):
        raise ArgumentError(f"attack={attack!r} must be an instance of a foolbox attack, such as foolbox.attacks.LinfPGD()")
    return FoolboxAttack(attack, early_stop)


@final
@dataclass(frozen=True)
class FoolboxAttack(Attack):
    """An attack of foolbox, with every query counted; made by `from_foolbox`.

    It serves the goals `Misclassify` and `ClassifyAs` with foolbox's own losses (a surrogate is not looked at, and the
    target's `draws` are not averaged), and the threat of the norm that the attack measures (its l0 serves `Pixels`).

    Attributes:
        attack: The foolbox attack.
        early_stop: Whether a minimum-norm attack may end once it is inside the budget everywhere.
    """

    attack: Any
    early_stop: bool = True

    def run(self, problem: Problem) -> Tensor:
        """foolbox's answer for the open examples, those of one budget together; x where it is not a number."""
        _check_threat(self.attack, problem.threat)
        x_adv = problem.x.clone()
        for eps, rows in list(by_budget(problem)):
            x_adv[rows] = self._ask(problem[rows], eps).to(x_adv)
        return finite(x_adv, problem.x)

    def _ask(self, problem: Problem, eps: float) -> Tensor:
        fb = load_foolbox()
        base, x = fb.attacks.base, problem.x
        fmodel = fb.PyTorchModel(ProblemModule(problem), bounds=problem.threat.bounds, device=x.device)
        criterion = _criterion(fb, problem)
        answer: Tensor
        try:
            if isinstance(self.attack, base.FixedEpsilonAttack):
                answer = self.attack.run(fmodel, x, criterion, epsilon=eps)
            elif isinstance(self.attack, base.MinimizationAttack):
                answer = self.attack.run(fmodel, x, criterion, early_stop=eps if self.early_stop else None)
            else:
                answer = self.attack(fmodel, x, criterion, epsilons=eps)[0]
        except ValueError as error:
            if "unsupported criterion" not in str(error):
                raise
            raise ArgumentError(f"goal={problem.goal!r} is not served by {self.attack!r}; choose another attack") from error
        return answer


def _criterion(fb: Any, problem: Problem) -> Any:
    if isinstance(problem.goal, Misclassify):
        return fb.criteria.Misclassification(problem.ref)
    if isinstance(problem.goal, ClassifyAs):
        return fb.criteria.TargetedMisclassification(problem.ref)
    raise ArgumentError(f"goal={problem.goal!r} must be Misclassify() or ClassifyAs(): foolbox attacks serve no other")


def _check_threat(attack: Any, threat: Threat) -> None:
    """Refuse a threat without bounds, and one that limits another norm than the attack."""
    if threat.bounds is None:
        raise ArgumentError("bounds=None: foolbox needs the lowest and highest valid value; state them in the threat")
    served = _NORMS.get(type(threat))
    try:
        norm = getattr(attack.distance, "p", None)
    except (AttributeError, ValueError):  # attacks without a distance of their own
        norm = None
    if None not in (served, norm) and served != norm:
        raise ArgumentError(f"threat={threat!r} is not what {attack!r} limits, which is the {attack.distance}")
