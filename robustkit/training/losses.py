"""Training losses of a model on a batch, for any training loop."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustkit.attack import Attack
from robustkit.threats import Threat

__all__ = ["madry", "standard"]


def standard(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy on clean examples.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs, (N, *S).
        y: Labels, (N,) int64 in [0, C).

    Returns:
        A scalar tensor, differentiable with respect to the parameters.
    """
    return cross_entropy(model(x), y)


def madry(model: nn.Module, x: Tensor, y: Tensor, *, attack: Attack, threat: Threat, seed: int = 0) -> Tensor:
    """The mean cross-entropy on adversarial examples: adversarial training.

    The attack runs on the model in evaluation mode; the loss is computed in the model's current mode.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs inside the threat's bounds, (N, *S).
        y: Labels, (N,) int64 in [0, C).
        attack: The attack for the inner maximisation, for example `PGD(steps=10)`.
        threat: The threat model.
        seed: Seed of the attack. It must differ in every step, or every batch uses the same random start; `fit` passes a
            new one in every step.

    Returns:
        A scalar tensor, differentiable with respect to the parameters.

    Raises:
        ArgumentError: A value is out of range, or inputs are outside the bounds.
        ShapeError: Shapes do not match, or the output is not logits.

    Source: Madry et al. 2018, eq. 2.1 (https://arxiv.org/abs/1706.06083).
    """
    x_adv = attack.perturb(model, x, y, threat=threat, seed=seed)
    return cross_entropy(model(x_adv), y)
