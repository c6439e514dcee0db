"""Convert attacks of foolbox to ours, and ours to foolbox's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from robustkit._engine.best_so_far import Keep, check_keep
from robustkit.attack import Attack
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal, Misclassify
from robustkit.interop._attack_to_foolbox import Recipe, wrap_recipe
from robustkit.interop._problem_module import ProblemModule, group_by_eps, replace_non_finite
from robustkit.interop.peers import load_foolbox
from robustkit.problem import Problem
from robustkit.threats import L1, L2, Linf, Pixels, Threat

if TYPE_CHECKING:
    from foolbox.attacks.base import FixedEpsilonAttack

__all__ = ["FoolboxAttack", "from_foolbox", "to_foolbox"]

# Any in this file: foolbox is optional, so a type checker may not find its types.

_NORMS: dict[type[Threat], float] = {Linf: torch.inf, L2: 2, L1: 1, Pixels: 0}


def to_foolbox(
    attack: Attack, *, threat: Threat, goal: Goal | None = None, seed: int = 0, keep: Keep = "first", batch_size: int = 128
) -> FixedEpsilonAttack:
    """Convert an attack to a foolbox attack: `to_foolbox(PGD(), threat=Linf(8 / 255))(fmodel, x, y, epsilons=[...])`.

    Labels and the criterion `Misclassification` stand for the goal `Misclassify()`, `TargetedMisclassification` for
    `ClassifyAs()`; other criteria have no loss and are refused. `.repeat(n)` runs with the seeds `seed`, `seed + 1`, ...,
    `seed + n - 1`, so equal calls give equal results; to share no random numbers, attacks need seeds at least n apart. The
    model's mode is not changed; foolbox requires `model.eval()`.

    Args:
        attack: The attack.
        threat: The threat model. Its eps is replaced by each of foolbox's epsilons, its bounds by the model's. Linf, L2 and
            L1 use foolbox's distances of these names; for other threats the distance is the threat's own size, since
            foolbox's l0 counts values and `Pixels` counts locations.
        goal: `Misclassify` or `ClassifyAs` with a surrogate other than cross-entropy; the criterion must be of that kind.
        seed: Any integer.
        keep: Which iterate is returned; "last" compares with foolbox's own attacks.
        batch_size: The largest number of images in one model call.

    Returns:
        A `foolbox.attacks.base.FixedEpsilonAttack`. For epsilon 0 it returns the inputs.

    Raises:
        ArgumentError: A value is out of range.
        MissingExtraError: foolbox is not installed.
    """
    if not isinstance(attack, Attack) or not isinstance(threat, Threat):
        raise ArgumentError(
            f"attack={attack!r} and threat={threat!r} must be robustkit objects, such as PGD() and Linf(8 / 255)"
        )
    if not isinstance(goal, Misclassify | ClassifyAs | None):
        raise ArgumentError(f"goal={goal!r} must be Misclassify(...) or ClassifyAs(...): foolbox's criteria support no other")
    check_keep(keep)
    adapter: FixedEpsilonAttack = wrap_recipe(load_foolbox(), Recipe(attack, threat, goal, seed, keep, batch_size))
    return adapter


def from_foolbox(attack: Any, *, early_stop: bool = True) -> FoolboxAttack:
    """Convert a foolbox attack to one of ours.

    Example: `from_foolbox(foolbox.attacks.LinfPGD(steps=40))(model, x, y, threat=Linf(0.1))`.

    foolbox's own success report is not used: the result is projected into the threat and judged again, so black images that
    an attack reports as successes do not count. With `keep="last"` that result is returned; otherwise the images that the
    attack queries on the way are candidates too. Its random numbers belong to the batch, not to the example: results are
    reproducible for the same seed and micro-batches, but depend on the micro-batch size.

    Args:
        attack: An instance, of fixed epsilon or minimum norm, repeated or not.
        early_stop: Whether a minimum-norm attack may stop once every example is solved within eps; False continues.

    Raises:
        ArgumentError: `attack` is not a foolbox attack.
        MissingExtraError: foolbox is not installed.
    """
    if not isinstance(attack, load_foolbox().attacks.base.Attack):
        raise ArgumentError(f"attack={attack!r} must be an instance of a foolbox attack, such as foolbox.attacks.LinfPGD()")
    return FoolboxAttack(attack, early_stop)


@final
@dataclass(frozen=True)
class FoolboxAttack(Attack):
    """An attack of foolbox, with every query counted; made by `from_foolbox`.

    It supports the goals `Misclassify` and `ClassifyAs` with foolbox's own losses (the goal's surrogate and the target's
    `draws` are ignored), and the threat of the norm that the attack measures (l0 supports `Pixels`).

    Attributes:
        attack: The foolbox attack.
        early_stop: Whether a minimum-norm attack may stop once every example is solved within eps.
    """

    attack: Any
    early_stop: bool = True

    def run(self, problem: Problem) -> Tensor:
        """Return foolbox's result for the unsolved examples, grouped by eps; x where the result is not finite."""
        _check_threat(self.attack, problem.threat)
        x_adv = problem.x.clone()
        for eps, rows in list(group_by_eps(problem)):
            x_adv[rows] = self._run_foolbox(problem[rows], eps).to(x_adv)
        return replace_non_finite(x_adv, problem.x)

    def _run_foolbox(self, problem: Problem, eps: float) -> Tensor:
        fb = load_foolbox()
        base, x = fb.attacks.base, problem.x
        fmodel = fb.PyTorchModel(ProblemModule(problem), bounds=problem.threat.bounds, device=x.device)
        criterion = _criterion(fb, problem)
        x_adv: Tensor
        try:
            if isinstance(self.attack, base.FixedEpsilonAttack):
                x_adv = self.attack.run(fmodel, x, criterion, epsilon=eps)
            elif isinstance(self.attack, base.MinimizationAttack):
                x_adv = self.attack.run(fmodel, x, criterion, early_stop=eps if self.early_stop else None)
            else:
                x_adv = self.attack(fmodel, x, criterion, epsilons=eps)[0]
        except ValueError as error:
            if "unsupported criterion" not in str(error):
                raise
            raise ArgumentError(f"goal={problem.goal!r} is not supported by {self.attack!r}; choose another attack") from error
        return x_adv


def _criterion(fb: Any, problem: Problem) -> Any:
    if isinstance(problem.goal, Misclassify):
        return fb.criteria.Misclassification(problem.ref)
    if isinstance(problem.goal, ClassifyAs):
        return fb.criteria.TargetedMisclassification(problem.ref)
    raise ArgumentError(f"goal={problem.goal!r} must be Misclassify() or ClassifyAs(): foolbox attacks support no other")


def _check_threat(attack: Any, threat: Threat) -> None:
    """Raise ArgumentError for a threat without bounds, or of another norm than the attack's."""
    if threat.bounds is None:
        raise ArgumentError("bounds=None: foolbox needs the lowest and highest valid value; give them in the threat")
    threat_norm = _NORMS.get(type(threat))
    try:
        norm = getattr(attack.distance, "p", None)
    except (AttributeError, ValueError):  # attacks without a distance of their own
        norm = None
    if None not in (threat_norm, norm) and threat_norm != norm:
        raise ArgumentError(f"threat={threat!r} does not match {attack!r}, which limits the {attack.distance}; choose another")
