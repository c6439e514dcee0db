"""An assertion for test suites: the robust accuracy of a model is at least a given value."""

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
    """Raise AssertionError if an attack brings the robust accuracy below `at_least`.

    Args:
        model: A classifier, (N, *S) -> logits (N, C).
        x: Inputs inside the threat's bounds, (N, *S).
        y: True classes, (N,) int64.
        threat: The threat model.
        at_least: The lowest accepted robust accuracy, in [0, 1]: the share of examples classified correctly before and after
            the attack.
        attack: The attack; default `PGD()`. It gives an upper bound of the robust accuracy, so passing is no proof.

    Returns:
        The result of the attack.

    Raises:
        AssertionError: Robust accuracy is lower; the message gives it and the first misclassified examples.
        ArgumentError: `at_least` is outside [0, 1], or there are no examples.
    """
    if not 0 <= at_least <= 1:
        raise ArgumentError(f"at_least={at_least!r} must be a share of the examples, in [0, 1]")
    if not len(x):
        raise ArgumentError("x holds no examples; give at least one")
    attack = attack or PGD()
    result = attack(model, x, y, threat=threat)
    wrong = result.success | _wrong_before(model, x, y, threat) if attack.universal else result.success
    robust = 1 - wrong.double().mean().item()
    if robust < at_least:
        first = wrong.nonzero().squeeze(1)[:10].tolist()
        raise AssertionError(
            f"robust accuracy is {robust:.1%} ({len(x) - int(wrong.sum())} of {len(x)}), below {at_least:.1%}, "
            f"under {threat} by {attack}; first misclassified examples: {first}"
        )
    return result


def _wrong_before(model: Target | nn.Module | Fn, x: Tensor, y: Tensor, threat: Threat) -> Tensor:
    """Return which clean examples are misclassified, (N,) bool; a universal perturbation may have corrected them."""
    return Perturbation(torch.zeros_like(x[:1]), "nothing")(model, x, y, threat=threat, keep="last").success
