"""Surrogate losses of a classifier, one value per example: the larger, the closer to a misclassification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.errors import ShapeError

__all__ = ["Loss", "cross_entropy", "dlr", "logits_of", "margin", "probability_margin", "targeted", "targeted_dlr"]

Loss = Callable[[Tensor, Tensor], Tensor]  # (N, C), (N,) -> (N,)


def logits_of(out: object, ref: Tensor) -> Tensor:
    """Check that `out` is a matrix of logits with one row per label of `ref`, and return it.

    Raises:
        ShapeError: `out` is not a floating-point tensor (N, C) with C >= 2, or `ref` is not (N,) int64.
    """
    if not isinstance(out, Tensor):
        raise ShapeError(
            f"the model returned {type(out).__name__}; a classification goal needs one tensor of logits (N, C): pass a "
            "function or module that returns them alone, such as lambda x: model(x)[0]"
        )
    if out.dim() == 2 and out.shape[1] == 1:
        raise ShapeError(
            f"the model returned one column, {tuple(out.shape)}; a classification goal needs logits (N, C), C >= 2: if it is "
            "the logit s of class 1, return torch.cat([torch.zeros_like(s), s], 1)"
        )
    if out.dim() != 2 or out.shape[1] < 2 or not out.is_floating_point():
        raise ShapeError(
            f"the model returned {out.dtype} of shape {tuple(out.shape)}; a classification goal needs logits (N, C), C >= 2"
        )
    if ref.dtype != torch.int64 or ref.shape != out.shape[:1]:
        raise ShapeError(
            f"labels are {ref.dtype} of shape {tuple(ref.shape)}, the logits are {tuple(out.shape)}; labels must be int64 (N,)"
        )
    return out


def cross_entropy(out: Tensor, ref: Tensor) -> Tensor:
    """Minus the log-probability of the true class.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: True class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), at least zero.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.
    """
    return functional.cross_entropy(logits_of(out, ref), ref, reduction="none")


def margin(out: Tensor, ref: Tensor) -> Tensor:
    """The logit margin: the largest logit of the other classes minus the logit of the true class.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: True class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,); positive where the example is misclassified.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Carlini & Wagner 2017, section V-A, f_6 with the opposite sign and without the clipping at kappa
    (https://arxiv.org/abs/1608.04644).
    """
    true, others = _split(out, ref)
    return others.amax(1) - true


def dlr(out: Tensor, ref: Tensor) -> Tensor:
    """Difference of logits ratio: the margin divided by the gap between the largest and third-largest logit.

    It is invariant to shifts and positive scaling of the logits.

    Args:
        out: Logits, shape (N, C), any real values; with C = 2 there is no third logit and the margin is returned.
        ref: True class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), at least -1 for C > 2; positive where the example is misclassified.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Croce & Hein 2020, eq. 6 (https://arxiv.org/abs/2003.01690).
    """
    if logits_of(out, ref).shape[1] < 3:
        return margin(out, ref)
    top = out.topk(3, 1).values
    return margin(out, ref) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(out: Tensor, ref: Tensor) -> Tensor:
    """Targeted difference of logits ratio: the margin of a target class, invariant to shifts and scaling of the logits.

    The margin is divided by the gap between the largest logit and the mean of the third- and fourth-largest: with the
    denominator of `dlr` the gradient would vanish for a target class that ranks third.

    Args:
        out: Logits, shape (N, C), any real values. With C = 3 the mean is that of the second- and third-largest; with C = 2
            the margin is returned.
        ref: Target class, shape (N,), int64 in [0, C), where other losses take the true class.

    Returns:
        Shape (N,); negative where the target class has the largest logit.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Croce & Hein 2020, eq. 7 (https://arxiv.org/abs/2003.01690). There the numerator has the logit of the true class,
    here the largest other logit: they are equal until the attack has succeeded. The form for three classes is ours.
    """
    classes = logits_of(out, ref).shape[1]
    if classes < 3:
        return margin(out, ref)
    top = out.topk(min(4, classes), 1).values
    return margin(out, ref) / (top[:, 0] - top[:, -2:].mean(1) + 1e-12)


def probability_margin(out: Tensor, ref: Tensor) -> Tensor:
    """The margin of the softmax probabilities; its gradient vanishes far from the decision boundary, on both sides.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: True class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), in [-1, 1]; positive where the example is misclassified.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Xie et al. 2024, "Towards million-scale adversarial robustness evaluation with stronger individual attacks"
    (https://arxiv.org/abs/2411.15210).
    """
    return margin(logits_of(out, ref).softmax(1), ref)


def targeted(loss: Loss) -> Loss:
    """The form of a surrogate loss for a target class: `targeted_dlr` for `dlr`, the loss itself for all others."""
    return targeted_dlr if loss is dlr else loss


def _split(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the true class, (N,), and the logits with the true class at minus infinity, (N, C)."""
    true = logits_of(out, ref).gather(1, ref.unsqueeze(1))
    return true.squeeze(1), out.scatter(1, ref.unsqueeze(1), -torch.inf)
