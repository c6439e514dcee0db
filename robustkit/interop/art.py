"""Convert attacks of the Adversarial Robustness Toolbox (ART) to ours, and our attacks and defences to ART's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, final
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from robustkit._engine.best_so_far import Keep
from robustkit._engine.state_guard import fork_rng
from robustkit.attack import Attack
from robustkit.defence import Defence
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import ClassifyAs, Goal, Misclassify
from robustkit.interop._art_estimator import classifier_of
from robustkit.interop._attack_to_art import NORMS, attack_class, preprocessor_class
from robustkit.interop._problem_module import PartialBatchError, ProblemModule, group_by_eps, replace_non_finite
from robustkit.interop.peers import load_art
from robustkit.problem import Problem
from robustkit.threats import Pixels, Threat

if TYPE_CHECKING:
    from art.attacks.attack import EvasionAttack
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from art.estimators.classification import PyTorchClassifier

__all__ = ["ArtAttack", "from_art", "preprocessor", "to_art"]

# Any in this file: ART is optional, so a type checker may not find its types.

_MAX_BATCH = 128  # the batch size of ART's predictions where an attack sets none


def to_art(
    attack: Attack,
    estimator: PyTorchClassifier,
    *,
    threat: Threat,
    goal: Goal = Misclassify(),
    seed: int = 0,
    keep: Keep = "first",
    batch_size: int = 128,
) -> EvasionAttack:
    """Convert an attack to an ART attack: `to_art(PGD(), classifier, threat=Linf(8 / 255)).generate(x, y)`.

    The result works in ART's tools, for example in `AdversarialTrainer`. `generate` takes and returns float32 arrays; y holds
    class indices or one-hot rows, and None means the estimator's own predictions. Equal calls give equal results.

    The whole estimator is attacked, and success is judged on its predictions. Gradients go through the preprocessing: for a
    torch preprocessor that overrides `estimate_forward` they are the gradient of that method (ART's attacks ignore it), for
    a numpy preprocessor they are its `estimate_gradient`. Training flags, parameters and their gradients are restored.

    `set_params` accepts attack, threat, goal, eps (of the threat), targeted (True sets the goal `ClassifyAs`, False
    `Misclassify`, with the surrogate of the current goal), seed, keep, batch_size and verbose (without effect).

    Args:
        attack: The attack.
        estimator: A classifier of ART: a `PyTorchClassifier`, or any for attacks that see outputs alone.
        threat: The threat model; its bounds are replaced by the estimator's `clip_values` if it has any.
        goal: `Misclassify` or `ClassifyAs`, with any surrogate.
        seed: Any integer.
        keep: Which iterate is returned.
        batch_size: The largest number of images in one model call.

    Returns:
        An `art.attacks.attack.EvasionAttack`. Its `generate` refuses a `mask` that contains zeros.

    Raises:
        ArgumentError: A value is out of range, the attack does not support the threat, or it needs gradients and the
            estimator has none in torch.
        MissingExtraError: ART is not installed.
    """
    load_art()
    if not isinstance(attack, Attack):
        raise ArgumentError(f"attack={attack!r} must be a robustkit attack, such as PGD()")
    try:
        adapter: EvasionAttack = attack_class(attack.access)(attack, estimator, threat, goal)
    except import_module("art.exceptions").EstimatorError as error:
        raise ArgumentError(f"estimator={estimator!r} must be an ART classifier, such as PyTorchClassifier") from error
    adapter.set_params(seed=seed, keep=keep, batch_size=batch_size)
    return adapter


def from_art(make: Callable[[PyTorchClassifier], EvasionAttack], *, one_by_one: bool = False) -> ArtAttack:
    """Convert an ART attack to one of ours: `from_art(lambda classifier: ProjectedGradientDescent(classifier, max_iter=40))`.

    `make` is called for each micro-batch and eps, with a classifier that wraps the attacked model. The attack's `targeted`
    is then set from the goal. If the attack limits the norm of the threat, `eps` is set from the threat, `eps_step` keeps
    its ratio to `eps`, and `th` of a `PixelAttack` is set to the number of pixels. An attack without a `targeted` parameter,
    such as `DeepFool`, gets no labels and starts from the predicted classes; for `ClassifyAs` with an attack that is always
    targeted (`SaliencyMapMethod`), set `targeted` in `make`.

    ART's own success report is not used: its result is projected into the threat and judged again. With `keep="last"` that
    result is returned; otherwise the images that the attack queries on the way are candidates too.

    A whole micro-batch is attacked at once. If the attack queries only some of its examples, queries cannot be charged to
    examples; the attack is then restarted on one example at a time (queries made before count). In batch mode ART's random
    numbers belong to the batch, not to the example: results are reproducible for the same seed and micro-batches, but
    depend on the micro-batch size. With `one_by_one=True` they belong to the example, and every law of `check_attack`
    holds; this is slow.

    Args:
        make: Builds the attack, PyTorchClassifier -> EvasionAttack; an attack class works too.
        one_by_one: Attack each example alone from the start.

    Raises:
        ArgumentError: `make` is not callable.
        MissingExtraError: ART is not installed.
    """
    load_art()
    if not callable(make):
        raise ArgumentError(f"make={make!r} must be a function from a classifier to an ART attack, or the class of one")
    return ArtAttack(make, one_by_one)


def preprocessor(defence: Defence, *, apply_fit: bool = False) -> PreprocessorPyTorch:
    """Convert a defence to an ART preprocessor: `PyTorchClassifier(..., preprocessing_defences=[preprocessor(Quantise(8))])`.

    Predictions use the defence itself; where ART differentiates, it uses the defence's first view. ART's documentation puts
    such a view into `estimate_forward`, but its torch path differentiates `forward` and ignores `estimate_forward`, so that a
    rounding defence written that way masks the gradient and looks robust. Here the view is inside `forward`, so ART's
    attacks use it. The defence is kept in evaluation mode and its parameters get no gradients. It is not moved: put it on
    the classifier's device.

    Args:
        defence: The defence.
        apply_fit: Whether the defence is also applied when `fit` trains the model.

    Raises:
        ArgumentError: `defence` is not a `Defence`, or has no views.
        MissingExtraError: ART is not installed.
    """
    load_art()
    adapter: PreprocessorPyTorch = preprocessor_class()(defence, apply_fit)
    return adapter


@final
@dataclass(frozen=True, repr=False)
class ArtAttack(Attack):
    """An attack of ART, with every query counted; made by `from_art`.

    It supports the goals `Misclassify` and `ClassifyAs` with ART's own losses (the goal's surrogate and the target's `draws`
    are ignored). An attack with a `norm` supports the threat of that norm, other attacks support any. ART computes in
    float32.

    Attributes:
        make: Builds the attack for a classifier.
        one_by_one: Whether each example is attacked alone.
    """

    make: Callable[[Any], Any]
    one_by_one: bool = False

    def __repr__(self) -> str:
        """The recipe, with functions by name, so that it is the same in every process."""
        return f"ArtAttack(make={getattr(self.make, '__qualname__', repr(self.make))}, one_by_one={self.one_by_one})"

    def run(self, problem: Problem) -> Tensor:
        """Return ART's result for the unsolved examples, grouped by eps; x where the result is not finite."""
        if not isinstance(problem.goal, Misclassify | ClassifyAs):
            raise ArgumentError(f"goal={problem.goal!r} must be Misclassify() or ClassifyAs(): ART's attacks support no other")
        x_adv, classes, one_by_one = problem.x.clone(), 0, self.one_by_one
        batches = [
            (eps, rows[i : i + _MAX_BATCH]) for eps, rows in group_by_eps(problem) for i in range(0, len(rows), _MAX_BATCH)
        ]
        for eps, rows in batches:
            classes = classes or _count_classes(problem[rows[:1]])
            if not one_by_one and len(rows) > 1:
                try:
                    x_adv[rows] = self._generate(problem[rows], eps, classes)
                    continue
                except PartialBatchError:
                    one_by_one = True
            for row in rows[problem.unsolved[rows]].unsqueeze(1):
                with fork_rng(problem.noise("art", int(problem.ids[row])).key):
                    x_adv[row] = self._generate(problem[row], eps, classes)
        return replace_non_finite(x_adv, problem.x)

    def _generate(self, problem: Problem, eps: float, classes: int) -> Tensor:
        x, ref = problem.x.cpu().float().numpy(), problem.ref.cpu().numpy()
        attack = self.make(classifier_of(ProblemModule(problem), problem.x, classes, problem.threat.bounds))
        pass_labels = _configure(attack, problem, eps, self.make)
        with warnings.catch_warnings(), patch.object(np.random, "RandomState", _SeededState):
            warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, about what ART does to tensors
            x_adv = attack.generate(x.copy(), np.eye(classes, dtype=np.float32)[ref] if pass_labels else None)
        if not isinstance(x_adv, np.ndarray) or x_adv.shape != x.shape:
            raise ShapeError(
                f"{attack!r} returned {getattr(x_adv, 'shape', type(x_adv).__name__)} for inputs {x.shape}; it must return "
                "that shape"
            )
        # Unchanged coordinates are taken from problem.x, which may not be representable in float32.
        return torch.where(torch.from_numpy(x_adv == x).to(problem.x.device), problem.x, torch.from_numpy(x_adv).to(problem.x))


@final
class _SeededState(np.random.RandomState):
    """A RandomState seeded from the global generator; some attacks (`HopSkipJump`) seed theirs from the operating system."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(np.random.randint(2**32, dtype=np.uint32) if seed is None else seed)


def _count_classes(problem: Problem) -> int:
    """Return the number of classes; costs one forward pass."""
    return int(problem.predict(problem.x).shape[1])


def _configure(attack: Any, problem: Problem, eps: float, make: Any) -> bool:
    """Set the goal and eps of an ART attack and return whether `generate` is given labels.

    Raises:
        ArgumentError: The attack does not support the goal or the threat.
        PartialBatchError: The attack does not accept the whole batch at once.
    """
    if not isinstance(attack, import_module("art.attacks.attack").EvasionAttack):
        raise ArgumentError(f"make={make!r} returned {attack!r}; it must return an instance of an ART evasion attack")
    if isinstance(getattr(attack, "attacks", None), list | tuple):
        raise ArgumentError(f"{attack!r} contains attacks whose goal and eps cannot be set; give them one by one")
    known, targeted = attack.attack_params, isinstance(problem.goal, ClassifyAs)
    params: dict[str, Any] = {"verbose": False, "targeted": targeted}
    if "targeted" not in known and bool(attack.targeted) != targeted:
        raise ArgumentError(f"goal={problem.goal!r} is not supported by {attack!r}; choose another attack")
    norm, threat_norm = getattr(attack, "norm", None), NORMS.get(type(problem.threat))
    norm = np.inf if norm == "inf" else norm
    if norm in NORMS.values() and norm != threat_norm:
        raise ArgumentError(
            f"threat={problem.threat!r} does not match {attack!r}, which limits the norm {norm}; choose another"
        )
    if norm is not None and norm == threat_norm and "eps" in known:
        params |= {"eps": eps}
        if "eps_step" in known and isinstance(attack.eps, int | float):
            params |= {"eps_step": attack.eps_step * (eps / attack.eps)}
    if isinstance(problem.threat, Pixels) and "th" in known and type(attack).__name__ == "PixelAttack":
        params |= {"th": int(eps)}
    attack.set_params(**{name: value for name, value in params.items() if name in known})
    if len(problem) > 1 and "batch_size" in known:  # for one example it only affects speed
        try:
            attack.set_params(batch_size=len(problem))
        except ValueError as error:
            raise PartialBatchError(f"{attack!r} does not accept {len(problem)} examples at once") from error
    # An attack without this parameter may always take y as the target class: given the label, it would aim at that.
    return targeted or "targeted" in known
