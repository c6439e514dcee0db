"""Goals on the logits of a classifier: any wrong class, or one wanted class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from robustkit._engine.introspection import module_of
from robustkit._engine.state_guard import fork_rng, frozen
from robustkit._engine.tensors import abs_max
from robustkit.errors import ShapeError
from robustkit.goals.goal import Goal, Out
from robustkit.losses import Loss, cross_entropy, logits_of, margin, targeted

__all__ = ["ClassifyAs", "Misclassify", "least_likely"]


@final
@dataclass(frozen=True, repr=False)
class Misclassify(Goal):
    """Any class but the right one. `ref`: the right classes, (N,) int64.

    Attributes:
        surrogate: The loss whose growth the attack follows; success does not depend on it.
    """

    surrogate: Loss = cross_entropy
    counts_if_already_true: ClassVar[bool] = True

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """Minus the surrogate of the right class, (N,)."""
        return -self.surrogate(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where another class comes first, or a logit is NaN or infinite: that is no right answer, whatever class comes first.

        Of classes that share the first place the one of the lowest number comes first, as `argmax` has it.
        """
        return ~_first(logits_of(out, ref), ref)

    def with_surrogate(self, surrogate: Loss) -> Goal:
        """Another surrogate."""
        return Misclassify(surrogate)

    def predicted_ref(self, out: Out, ref: Tensor) -> Tensor:
        """The classes that come first, (N,) int64."""
        return logits_of(out, ref).argmax(1)

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """How far the right class is ahead of the strongest other."""
        return -margin(out, ref)

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """One `ClassifyAs` for each rank among the wrong classes, that of the largest logit first."""
        others = logits_of(out, ref).scatter(1, ref.unsqueeze(1), -torch.inf).argsort(1, descending=True)[:, :-1]
        return [(ClassifyAs().with_surrogate(self.surrogate), column) for column in others.unbind(1)]

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

    def with_surrogate(self, surrogate: Loss) -> Goal:
        """Another surrogate, in its form for one wanted class."""
        return ClassifyAs(targeted(surrogate))

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """How far the wanted class is behind the strongest other."""
        return margin(out, ref)

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse outputs that are no logits, and wanted classes that are no classes of theirs."""
        _check_classes(out, ref)


def _first(logits: Tensor, ref: Tensor) -> Tensor:
    """Where the class `ref` comes first and every logit is a finite number, (N,) bool."""
    return (logits.argmax(1) == ref) & (abs_max(logits) < torch.inf)  # of what is no number the largest is none either


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
    with torch.no_grad(), frozen(module_of(model), "eval"), fork_rng(0):
        parts = [model(x[i : i + batch_size]).argmin(1) for i in range(0, len(x), batch_size)]
    return torch.cat([x.new_zeros(0, dtype=torch.int64), *parts])
