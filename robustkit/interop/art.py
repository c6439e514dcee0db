"""Attacks of IBM's Adversarial Robustness Toolbox under our interface; our attacks and defences under its own."""

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
from robustkit.interop._problem_module import ProblemModule, SomeRowsError, by_budget, finite
from robustkit.interop.peers import load_art
from robustkit.problem import Problem
from robustkit.threats import Pixels, Threat

if TYPE_CHECKING:
    from art.attacks.attack import EvasionAttack
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from art.estimators.classification import PyTorchClassifier

__all__ = ["ArtAttack", "from_art", "preprocessor", "to_art"]

# Any in this file: what belongs to ART, which is optional, so a type checker may not find it.

_MOST = 128  # rows at once in ART's predictions, where an attack does not say otherwise


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
    """One of our attacks as an ART attack: `to_art(PGD(), classifier, threat=Linf(8 / 255)).generate(x, y)`.

    ART's tools take it like one of their own, `AdversarialTrainer` among them. `generate` takes and gives float32 arrays;
    y holds classes or one-hot rows, None stands for what the estimator predicts. Equal calls give equal results.

    The whole estimator is attacked, and success is judged on what it predicts. Gradients go through the preprocessing: of
    a torch preprocessor with an `estimate_forward` of its own they are the derivative of that (ART's attacks ignore it),
    of a numpy preprocessor what its `estimate_gradient` says. Afterwards the training flags, parameters and their
    gradients are as before.

    `set_params` knows attack, threat, goal, eps (the threat's), targeted (True is the goal `ClassifyAs`, False
    `Misclassify`, with the surrogate that the goal has), seed, keep, batch_size and verbose (which says nothing here).

    Args:
        attack: The attack.
        estimator: A classifier of ART: a `PyTorchClassifier`, or any for attacks that see outputs alone.
        threat: What may change; the estimator's `clip_values`, where it has them, take the place of its bounds.
        goal: `Misclassify` or `ClassifyAs`, with any surrogate.
        seed: Any integer.
        keep: Which iterate comes back.
        batch_size: The most images that go through the model at once.

    Returns:
        An `art.attacks.attack.EvasionAttack`. Its `generate` refuses a `mask` with zeros in it.

    Raises:
        ArgumentError: A value outside its range, an attack that does not serve the threat, or one that needs gradients of
            an estimator that has none in torch.
        MissingExtraError: ART is not installed.
    """
    load_art()
    if not isinstance(attack, Attack):
        raise ArgumentError(f"attack={attack!r} must be ours, such as PGD()")
    try:
        adapter: EvasionAttack = attack_class(attack.access)(attack, estimator, threat, goal)
    except import_module("art.exceptions").EstimatorError as error:
        raise ArgumentError(f"estimator={estimator!r} must be a classifier of ART, such as PyTorchClassifier") from error
    adapter.set_params(seed=seed, keep=keep, batch_size=batch_size)
    return adapter


def from_art(make: Callable[[PyTorchClassifier], EvasionAttack], *, one_by_one: bool = False) -> ArtAttack:
    """An ART attack as one of ours: `from_art(lambda classifier: ProjectedGradientDescent(classifier, max_iter=40))`.

    `make` is called with a classifier that leads to the attacked model, for each batch and budget. The attack then is
    asked for the goal (`targeted`) and, where it limits the norm of the threat, for its budget: `eps` becomes the
    threat's, `eps_step` keeps its ratio to it, `th` of a `PixelAttack` becomes the number of pixels. One that cannot be
    switched, such as `DeepFool`, is told no classes and starts from the predicted ones; for `ClassifyAs`, set `targeted` of
    an attack that always wants a class (`SaliencyMapMethod`) in `make`.

    ART's answer counts for nothing by itself: it is brought into the threat and judged anew. With `keep="last"` that
    answer is what comes back; otherwise the images that it tries on the way compete too.

    A whole micro-batch is attacked at once. From the first question on that is about some of its examples alone, nobody
    could say whose cost a question is, so the attack starts anew and takes one example after the other (what was spent
    until then is counted). ART's random numbers then belong to the batch, not to the example: results repeat for the same
    seed and micro-batches, but change with the size of these. With `one_by_one=True` they belong to the example, and every
    law of `check_attack` holds; it is slow.

    Args:
        make: Builds the attack, PyTorchClassifier -> EvasionAttack; the class of an attack will do.
        one_by_one: Attack each example alone from the start.

    Raises:
        ArgumentError: `make` is no function.
        MissingExtraError: ART is not installed.
    """
    load_art()
    if not callable(make):
        raise ArgumentError(f"make={make!r} must be a function from a classifier to an ART attack, or the class of one")
    return ArtAttack(make, one_by_one)


def preprocessor(defence: Defence, *, apply_fit: bool = False) -> PreprocessorPyTorch:
    """A defence as an ART preprocessor, for `PyTorchClassifier(..., preprocessing_defences=[preprocessor(Quantise(8))])`.

    Predictions go through the defence itself; where ART differentiates, it gets the defence's first view. ART's torch
    path differentiates `forward` and ignores `estimate_forward`, which is where its own documentation has such a rule
    written: rounding written that way looks unbroken. Here the rule is inside `forward`, so ART's attacks follow it too.
    The defence is held in evaluation mode and its parameters get no gradients. It is not moved: put it on the
    classifier's device.

    Args:
        defence: The defence.
        apply_fit: Whether `fit` trains the model behind it.

    Raises:
        ArgumentError: `defence` is no `Defence`, or names no views.
        MissingExtraError: ART is not installed.
    """
    load_art()
    adapter: PreprocessorPyTorch = preprocessor_class()(defence, apply_fit)
    return adapter


@final
@dataclass(frozen=True, repr=False)
class ArtAttack(Attack):
    """An attack of ART, with every query counted; made by `from_art`.

    It serves the goals `Misclassify` and `ClassifyAs` with ART's own losses (a surrogate is not looked at, and the
    target's `draws` are not averaged). An attack with a `norm` serves the threat of that norm, others any. ART computes in
    float32.

    Attributes:
        make: Builds the attack for a classifier.
        one_by_one: Whether each example is attacked alone.
    """

    make: Callable[[Any], Any]
    one_by_one: bool = False

    def __repr__(self) -> str:
        """The recipe: functions by their names, so that it reads the same in every process."""
        return f"ArtAttack(make={getattr(self.make, '__qualname__', repr(self.make))}, one_by_one={self.one_by_one})"

    def run(self, problem: Problem) -> Tensor:
        """ART's answer for the open examples, those of one budget together; x where it is not a number."""
        if not isinstance(problem.goal, Misclassify | ClassifyAs):
            raise ArgumentError(f"goal={problem.goal!r} must be Misclassify() or ClassifyAs(): ART's attacks serve no other")
        x_adv, classes, apart = problem.x.clone(), 0, self.one_by_one
        parts = [(eps, rows[i : i + _MOST]) for eps, rows in by_budget(problem) for i in range(0, len(rows), _MOST)]
        for eps, rows in parts:
            classes = classes or _classes(problem[rows[:1]])
            if not apart and len(rows) > 1:
                try:
                    x_adv[rows] = self._ask(problem[rows], eps, classes)
                    continue
                except SomeRowsError:
                    apart = True
            for row in rows[problem.unsolved[rows]].unsqueeze(1):
                with fork_rng(problem.noise("art", int(problem.ids[row])).key):
                    x_adv[row] = self._ask(problem[row], eps, classes)
        return finite(x_adv, problem.x)

    def _ask(self, problem: Problem, eps: float, classes: int) -> Tensor:
        x, ref = problem.x.cpu().float().numpy(), problem.ref.cpu().numpy()
        attack = self.make(classifier_of(ProblemModule(problem), problem.x, classes, problem.threat.bounds))
        told = _set(attack, problem, eps, self.make)
        with warnings.catch_warnings(), patch.object(np.random, "RandomState", _State):
            warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, about what ART does to tensors
            found = attack.generate(x.copy(), np.eye(classes, dtype=np.float32)[ref] if told else None)
        if not isinstance(found, np.ndarray) or found.shape != x.shape:
            raise ShapeError(f"{attack!r} gave {getattr(found, 'shape', type(found).__name__)} for inputs {x.shape}")
        # What it left alone stays as it was bit for bit, also where x does not fit into float32.
        return torch.where(torch.from_numpy(found == x).to(problem.x.device), problem.x, torch.from_numpy(found).to(problem.x))


@final
class _State(np.random.RandomState):
    """Seeded from the global generator: some attacks (`HopSkipJump`) take theirs anew from the operating system."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(np.random.randint(2**32, dtype=np.uint32) if seed is None else seed)


def _classes(problem: Problem) -> int:
    """How many classes the model has: one look at its output."""
    return int(problem.predict(problem.x).shape[1])


def _set(attack: Any, problem: Problem, eps: float, make: Any) -> bool:
    """Bring an attack to the goal and the budget of the problem, or refuse it; whether it is to be told the classes."""
    if not isinstance(attack, import_module("art.attacks.attack").EvasionAttack):
        raise ArgumentError(f"make={make!r} gave {attack!r}; it must give an instance of an ART evasion attack")
    if isinstance(getattr(attack, "attacks", None), list | tuple):
        raise ArgumentError(f"{attack!r} holds attacks whose goal and budget nobody can set from outside; give them one by one")
    known, wanted = attack.attack_params, isinstance(problem.goal, ClassifyAs)
    params: dict[str, Any] = {"verbose": False, "targeted": wanted}
    if "targeted" not in known and bool(attack.targeted) != wanted:
        raise ArgumentError(f"goal={problem.goal!r} is not served by {attack!r}; choose another attack")
    norm, served = getattr(attack, "norm", None), NORMS.get(type(problem.threat))
    norm = np.inf if norm == "inf" else norm
    if norm in NORMS.values() and norm != served:
        raise ArgumentError(f"threat={problem.threat!r} is not what {attack!r} limits, which is the norm {norm}")
    if norm is not None and norm == served and "eps" in known:
        params |= {"eps": eps}
        if "eps_step" in known and isinstance(attack.eps, int | float):
            params |= {"eps_step": attack.eps_step * (eps / attack.eps)}
    if isinstance(problem.threat, Pixels) and "th" in known and type(attack).__name__ == "PixelAttack":
        params |= {"th": int(eps)}
    attack.set_params(**{name: value for name, value in params.items() if name in known})
    if len(problem) > 1 and "batch_size" in known:  # with one example it is a matter of speed alone
        try:
            attack.set_params(batch_size=len(problem))
        except ValueError as error:
            raise SomeRowsError(f"{attack!r} takes no {len(problem)} examples at once") from error
    # What has no such switch may take y for the wanted class always, and would then work to keep the right one.
    return wanted or "targeted" in known
