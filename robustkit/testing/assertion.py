"""One line for a test suite: this model must stay right on this share of the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustkit.attack import Attack
from robustkit.attacks import PGD, Perturbation
from robustkit.errors import ArgumentError
from robustkit.result import Result
from robustkit.target import Fn, Target
from robustkit.threats import Threat

__all__ = ["assert_robust"]


def assert_robust(
    model: Target | nn.Module | Fn, x: Tensor, y: Tensor, *, threat: Threat, at_least: float, attack: Attack | None = None
) -> Result:
    """Fail unless the robust accuracy found by an attack is at least `at_least`.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs inside the threat's bounds, (N, *S).
        y: Right classes, (N,) int64.
        threat: What may change.
        at_least: The lowest accepted share of examples, in [0, 1], that are classified correctly before and after.
        attack: How to attack; default `PGD()`. Passing shows only that this attack found no more: an upper bound.

    Returns:
        The result of the attack.

    Raises:
        AssertionError: Robust accuracy is lower; the message names the figure and the first broken examples.
        ArgumentError: `at_least` is no share, or there are no examples.
    """
    if not 0 <= at_least <= 1:
        raise ArgumentError(f"at_least={at_least!r} must be a share of the examples, in [0, 1]")
    if not len(x):
        raise ArgumentError("x holds no examples; a share of nothing says nothing")
    attack = attack or PGD()
    result = attack(model, x, y, threat=threat)
    lost = result.success | _wrong_before(model, x, y, threat) if attack.universal else result.success
    robust = 1 - lost.double().mean().item()
    if robust < at_least:
        broken = lost.nonzero().squeeze(1)[:10].tolist()
        raise AssertionError(
            f"robust accuracy is {robust:.1%} ({len(x) - int(lost.sum())} of {len(x)}), below {at_least:.1%}, "
            f"under {threat} by {attack}; first broken examples: {broken}"
        )
    return result


def _wrong_before(model: Target | nn.Module | Fn, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Which examples are wrong as they are, (N,) bool: a universal change may have made them right."""
    return Perturbation(torch.zeros_like(x[:1]), "nothing")(model, x, y, threat=threat, keep="last").success
