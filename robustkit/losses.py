"""Per-example surrogates for "the right class loses": large where the classifier is about to be wrong."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from robustkit.errors import ShapeError

__all__ = ["Loss", "cross_entropy", "dlr", "logits_of", "margin", "probability_margin", "targeted", "targeted_dlr"]

Loss = Callable[[Tensor, Tensor], Tensor]  # (N, C), (N,) -> (N,)


def logits_of(out: object, ref: Tensor) -> Tensor:
    """`out` itself, if it is a matrix of logits with a row for each label of `ref`.

    Raises:
        ShapeError: `out` is not a floating tensor (N, C) with C >= 2, or `ref` is not (N,) int64.
    """
    if not isinstance(out, Tensor):
        raise ShapeError(
            f"the model returned {type(out).__name__}; a classification goal needs one tensor of logits (N, C): give a "
            "function or module that returns them alone, such as lambda x: model(x)[0]"
        )
    if out.dim() == 2 and out.shape[1] == 1:
        raise ShapeError(
            f"the model returned one column, {tuple(out.shape)}; a classification goal needs logits (N, C), C >= 2: where it "
            "is the logit s of class 1, return torch.cat([torch.zeros_like(s), s], 1)"
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
    """Minus the log-probability of the right class.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: Right class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), at least zero.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.
    """
    return functional.cross_entropy(logits_of(out, ref), ref, reduction="none")


def margin(out: Tensor, ref: Tensor) -> Tensor:
    """How far the strongest wrong class is ahead of the right one.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: Right class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,); positive where the right class loses.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Carlini & Wagner 2017, section V-A, f_6 with its sign turned, not clipped at kappa
    (https://arxiv.org/abs/1608.04644).
    """
    right, wrong = _split(out, ref)
    return wrong.amax(1) - right


def dlr(out: Tensor, ref: Tensor) -> Tensor:
    """The margin in units of the distance between the first and the third logit: blind to the scale of the logits.

    Args:
        out: Logits, shape (N, C), any real values; with C = 2 there is no third logit and the plain margin is returned.
        ref: Right class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), at least -1 for C > 2; positive where the right class loses.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Croce & Hein 2020, eq. 6 (https://arxiv.org/abs/2003.01690).
    """
    if logits_of(out, ref).shape[1] < 3:
        return margin(out, ref)
    top = out.topk(3, 1).values
    return margin(out, ref) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(out: Tensor, ref: Tensor) -> Tensor:
    """How far one wanted class is ahead of all others, in units that are blind to the scale of the logits.

    The unit is the distance of the first logit from the mean of the third and the fourth: with `dlr`'s own unit a wanted class
    that comes third would have no gradient.

    Args:
        out: Logits, shape (N, C), any real values. With C = 3 the mean is that of the second and the third; with C = 2 the
            plain margin is returned.
        ref: Wanted class, shape (N,), int64 in [0, C), in the place where other losses have the right class.

    Returns:
        Shape (N,); negative where the wanted class comes first.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Croce & Hein 2020, eq. 7 (https://arxiv.org/abs/2003.01690). There the numerator holds the right class, here the
    strongest other one: the same until the attack has succeeded. The form for three classes is ours.
    """
    classes = logits_of(out, ref).shape[1]
    if classes < 3:
        return margin(out, ref)
    top = out.topk(min(4, classes), 1).values
    return margin(out, ref) / (top[:, 0] - top[:, -2:].mean(1) + 1e-12)


def probability_margin(out: Tensor, ref: Tensor) -> Tensor:
    """The margin of the probabilities that the logits stand for: it fades where an example is hopeless or done.

    Args:
        out: Logits, shape (N, C), any real values.
        ref: Right class, shape (N,), int64 in [0, C).

    Returns:
        Shape (N,), in [-1, 1]; positive where the right class loses.

    Raises:
        ShapeError: `out` is not a matrix of logits or `ref` does not match it.

    Source: Xie et al. 2024, "Towards million-scale adversarial robustness evaluation with stronger individual attacks"
    (https://arxiv.org/abs/2411.15210).
    """
    return margin(logits_of(out, ref).softmax(1), ref)


def targeted(loss: Loss) -> Loss:
    """The form of a surrogate for one wanted class: of `dlr` it is `targeted_dlr`, all others are their own."""
    return targeted_dlr if loss is dlr else loss


def _split(out: Tensor, ref: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the right class (N,), and all others (N, C) with the right one at minus infinity."""
    right = logits_of(out, ref).gather(1, ref.unsqueeze(1))
    return right.squeeze(1), out.scatter(1, ref.unsqueeze(1), -torch.inf)
