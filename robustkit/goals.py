"""WHAT SUCCESS IS: a loss that attacks descend, and the fact that they want to bring about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from robustkit._behind import module_of
from robustkit._tensors import amax
from robustkit._world import held, seeded
from robustkit.errors import ShapeError
from robustkit.losses import Loss, cross_entropy, logits_of, margin, targeted

__all__ = ["ClassifyAs", "Goal", "Misclassify", "Out", "least_likely"]

Out = Any  # what a target returns: a tensor (N, ...) or a tuple of such; only the goal knows which


class Goal(ABC):
    """What an adversary wants of a model's output, compared with a reference.

    The reference `ref` comes with the call: labels, wanted classes, embeddings, images, one row an example. Goals hold
    no data, so they index, batch and print. Concrete goals are frozen dataclasses.

    Attributes:
        met_before: True where an input on which the goal holds without any change counts as a success of size zero
            (a classifier that is wrong anyway). Other goals attack such inputs like all others.
        vanishes_at_x: True where the gradient is zero at the unchanged input by mathematics (a distance to the
            output itself), so that a zero there is no sign of a masked gradient. Such goals need a random start.
    """

    met_before: ClassVar[bool] = False
    vanishes_at_x: ClassVar[bool] = False

    @abstractmethod
    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """What attacks descend, (N,)."""

    @abstractmethod
    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Whether the goal is reached, (N,) bool."""

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """Sub-goals any of which is enough, each with its reference (N,), likeliest first; by default the goal itself.

        Attacks that try one direction after another work through this, so that none needs to know what a label is.
        """
        return [(self, ref)]

    def by(self, surrogate: Loss) -> Goal:
        """The same goal with another loss to follow; by default itself, which knows but one."""
        return self

    def own(self, out: Out, ref: Tensor) -> Tensor:
        """The reference with the model's own answer `out` in the place of the truth; by default `ref`, which is no truth.

        What is learned against it asks for a change of the answer, whether the answer was right or wrong.
        """
        return ref

    def edge(self, out: Out, ref: Tensor) -> Tensor:
        """How far the output is from the goal, (N,): above zero before it is reached, zero at the border; by default the loss.

        For attacks that look for the border. Goals whose loss is not zero there have to say something else.
        """
        return self.loss(out, ref)

    def __repr__(self) -> str:
        """The recipe: functions by their names, so that it reads the same in every process."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        given = [f"{name}={getattr(value, '__name__', repr(value))}" for name, value in values]
        return f"{type(self).__name__}({', '.join(given)})"

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse an output or a reference that this goal cannot read; called once a run, so it may be thorough.

        Raises:
            ShapeError: With what came and what was expected.
        """
        return


@final
@dataclass(frozen=True, repr=False)
class Misclassify(Goal):
    """Any class but the right one. `ref`: the right classes, (N,) int64.

    Attributes:
        surrogate: The loss whose growth the attack follows; success does not depend on it.
    """

    surrogate: Loss = cross_entropy
    met_before: ClassVar[bool] = True

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """Minus the surrogate of the right class, (N,)."""
        return -self.surrogate(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where another class comes first, or a logit is NaN or infinite: that is no right answer, whatever class comes first.

        Of classes that share the first place the one of the lowest number comes first, as `argmax` has it.
        """
        return ~_first(logits_of(out, ref), ref)

    def by(self, surrogate: Loss) -> Goal:
        """Another surrogate."""
        return Misclassify(surrogate)

    def own(self, out: Out, ref: Tensor) -> Tensor:
        """The classes that come first, (N,) int64."""
        return logits_of(out, ref).argmax(1)

    def edge(self, out: Out, ref: Tensor) -> Tensor:
        """How far the right class is ahead of the strongest other."""
        return -margin(out, ref)

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """One `ClassifyAs` for each rank among the wrong classes, that of the largest logit first."""
        others = logits_of(out, ref).scatter(1, ref.unsqueeze(1), -torch.inf).argsort(1, descending=True)[:, :-1]
        return [(ClassifyAs().by(self.surrogate), column) for column in others.unbind(1)]

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse outputs that are no logits, and labels that are no classes of theirs."""
        _check_classes(out, ref)


@final
@dataclass(frozen=True, repr=False)
class ClassifyAs(Goal):
    """One wanted class. `ref`: the wanted classes, (N,) int64.

    Attributes:
        surrogate: The loss whose fall the attack follows; success does not depend on it.
    """

    surrogate: Loss = cross_entropy

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The surrogate of the wanted class, (N,)."""
        return self.surrogate(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where the wanted class comes first and every logit is a finite number."""
        return _first(logits_of(out, ref), ref)

    def by(self, surrogate: Loss) -> Goal:
        """Another surrogate, in its form for one wanted class."""
        return ClassifyAs(targeted(surrogate))

    def edge(self, out: Out, ref: Tensor) -> Tensor:
        """How far the wanted class is behind the strongest other."""
        return margin(out, ref)

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse outputs that are no logits, and wanted classes that are no classes of theirs."""
        _check_classes(out, ref)


def _first(logits: Tensor, ref: Tensor) -> Tensor:
    """Where the class `ref` comes first and every logit is a finite number, (N,) bool."""
    return (logits.argmax(1) == ref) & (amax(logits) < torch.inf)  # of what is no number the largest is none either


def _check_classes(out: Out, ref: Tensor) -> None:
    classes = logits_of(out, ref).shape[1]
    if len(ref) and not bool(((ref >= 0) & (ref < classes)).all()):
        raise ShapeError(
            f"labels run from {int(ref.min())} to {int(ref.max())}, but the model has {classes} classes: "
            f"they must lie in [0, {classes})"
        )


def least_likely(model: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 128) -> Tensor:
    """The class that the model finds least likely for each x: the wanted class of a hard targeted attack.

    Args:
        model: A classifier, (N, *S) -> logits (N, C); a module is held in evaluation mode.
        x: Inputs, (N, *S).
        batch_size: The most inputs that go through the model at once.

    Returns:
        Shape (N,), int64.

    Source: Kurakin et al. 2017, "Adversarial examples in the physical world", section 2.3 (https://arxiv.org/abs/1607.02533).
    """
    with torch.no_grad(), held(module_of(model), "eval"), seeded(0):
        parts = [model(x[i : i + batch_size]).argmin(1) for i in range(0, len(x), batch_size)]
    return torch.cat([x.new_zeros(0, dtype=torch.int64), *parts])
