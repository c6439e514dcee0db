"""Goals on the logits of a classifier: misclassification (untargeted), or one target class (targeted)."""

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
    """Any class but the true one (untargeted). `ref`: the true classes, (N,) int64.

    Attributes:
        surrogate: The loss that the attack maximises; success does not depend on it.
    """

    surrogate: Loss = cross_entropy
    counts_if_already_true: ClassVar[bool] = True

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """Minus the surrogate loss of the true class, (N,)."""
        return -self.surrogate(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where another class is predicted, or a logit is NaN or infinite: such an output counts as wrong, (N,) bool.

        Where several classes are tied, the one with the lowest index is predicted, as by `argmax`.
        """
        return ~_predicted_as(logits_of(out, ref), ref)

    def with_surrogate_loss(self, surrogate: Loss) -> Goal:
        """The same goal with another surrogate loss."""
        return Misclassify(surrogate)

    def predicted_ref(self, out: Out, ref: Tensor) -> Tensor:
        """The predicted classes, (N,) int64."""
        return logits_of(out, ref).argmax(1)

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """The logit of the true class minus the largest other logit, (N,)."""
        return -margin(out, ref)

    def parts(self, out: Out, ref: Tensor) -> list[tuple[Goal, Tensor]]:
        """One `ClassifyAs` for each rank among the other classes, the largest logit first."""
        others = logits_of(out, ref).scatter(1, ref.unsqueeze(1), -torch.inf).argsort(1, descending=True)[:, :-1]
        return [(ClassifyAs().with_surrogate_loss(self.surrogate), column) for column in others.unbind(1)]

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse outputs that are not logits, and labels outside [0, C)."""
        _check_classes(out, ref)


@final
@dataclass(frozen=True, repr=False)
class ClassifyAs(Goal):
    """One target class (targeted). `ref`: the target classes, (N,) int64.

    Attributes:
        surrogate: The loss that the attack minimises; success does not depend on it.
    """

    surrogate: Loss = cross_entropy

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The surrogate loss of the target class, (N,)."""
        return self.surrogate(out, ref)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """Where the target class is predicted and every logit is finite, (N,) bool."""
        return _predicted_as(logits_of(out, ref), ref)

    def with_surrogate_loss(self, surrogate: Loss) -> Goal:
        """The same goal with another surrogate loss, in its targeted form."""
        return ClassifyAs(targeted(surrogate))

    def boundary_margin(self, out: Out, ref: Tensor) -> Tensor:
        """The largest other logit minus the logit of the target class, (N,)."""
        return margin(out, ref)

    def check(self, out: Out, ref: Tensor) -> None:
        """Refuse outputs that are not logits, and target classes outside [0, C)."""
        _check_classes(out, ref)


def _predicted_as(logits: Tensor, ref: Tensor) -> Tensor:
    """Where the class `ref` is predicted and every logit is finite, (N,) bool."""
    return (logits.argmax(1) == ref) & (abs_max(logits) < torch.inf)  # abs_max is NaN where a logit is, so this is False


def _check_classes(out: Out, ref: Tensor) -> None:
    classes = logits_of(out, ref).shape[1]
    if len(ref) and not bool(((ref >= 0) & (ref < classes)).all()):
        raise ShapeError(
            f"labels run from {int(ref.min())} to {int(ref.max())}, but the model has {classes} classes: "
            f"they must lie in [0, {classes})"
        )


def least_likely(model: Callable[[Tensor], Tensor], x: Tensor, *, batch_size: int = 128) -> Tensor:
    """The class that the model finds least likely for each x, as the target class of a hard targeted attack.

    Args:
        model: A classifier, (N, *S) -> logits (N, C); a module is run in evaluation mode.
        x: Inputs, (N, *S).
        batch_size: The largest batch for the model.

    Returns:
        Shape (N,), int64.

    Source: Kurakin et al. 2017, "Adversarial examples in the physical world", section 2.3 (https://arxiv.org/abs/1607.02533).
    """
    with torch.no_grad(), frozen(module_of(model), "eval"), fork_rng(0):
        parts = [model(x[i : i + batch_size]).argmin(1) for i in range(0, len(x), batch_size)]
    return torch.cat([x.new_zeros(0, dtype=torch.int64), *parts])
