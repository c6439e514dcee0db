"""What training makes small: scalar losses of a model on a batch, for any loop."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robustkit.attack import Attack
from robustkit.threats import Threat

__all__ = ["madry", "standard"]


def standard(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy on the batch as it is.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs, (N, *S).
        y: Their classes, (N,) int64 in [0, C).

    Returns:
        A scalar with a graph to the parameters.
    """
    return cross_entropy(model(x), y)


def madry(model: nn.Module, x: Tensor, y: Tensor, *, attack: Attack, threat: Threat, seed: int = 0) -> Tensor:
    """The mean cross-entropy at the points that an attack finds: adversarial training.

    The attack sees the model in evaluation mode; the loss is taken in the model's own mode.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs inside the threat's bounds, (N, *S).
        y: Their classes, (N,) int64 in [0, C).
        attack: How the inner maximum is sought, for instance `PGD(steps=10)`.
        threat: What the adversary may change.
        seed: Names the attack's random numbers: give a different one at every step, or every batch starts from the same
            points. `fit` does so by itself.

    Returns:
        A scalar with a graph to the parameters.

    Raises:
        ArgumentError: A value outside its range, inputs outside the bounds among them.
        ShapeError: Tensors that do not fit each other, or an output that is no logits.

    Source: Madry et al. 2018, eq. 2.1 (https://arxiv.org/abs/1706.06083).
    """
    x_adv = attack.perturb(model, x, y, threat=threat, seed=seed)
    return cross_entropy(model(x_adv), y)
