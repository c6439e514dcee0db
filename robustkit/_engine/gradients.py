"""Gradients with respect to the inputs of a model: computed, averaged over draws and tested for a signal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robustkit._engine.state_guard import is_out_of_memory
from robustkit._engine.tensors import abs_max

__all__ = ["input_gradient", "mean", "vjp", "without_signal"]


def input_gradient(values: Tensor, x: Tensor, *, retain_graph: bool = False) -> Tensor | None:
    """d sum(values) / dx, with the shape of `x`; zero where no path leads from x to the values.

    Returns:
        The gradient, or None where autograd raised: the caller records this as a defect of the model.

    Raises:
        RuntimeError: Memory ran out.
    """
    if not values.requires_grad:
        return torch.zeros_like(x)
    try:
        (grad,) = torch.autograd.grad(values.sum(), x, allow_unused=True, retain_graph=retain_graph)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return None
    return torch.zeros_like(x) if grad is None else grad.detach()


def vjp(out: Tensor, x: Tensor, grad_out: Tensor) -> Tensor:
    """The product of d loss / d out, (N, K), with the Jacobian d out / dx, (N, *S); zero without a path from x to `out`."""
    if not out.requires_grad:
        return torch.zeros_like(x)
    (grad,) = torch.autograd.grad(out, x, grad_out, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def without_signal(grad: Tensor) -> Tensor | None:
    """Which gradients, (N,) bool, are zero or not finite; None where there are none, which is the usual case and cheap."""
    largest = abs_max(grad)
    low, high = (float(bound) for bound in torch.aminmax(largest)) if len(largest) else (1.0, 1.0)
    if low > 0 and high < math.inf:  # both comparisons fail for NaN
        return None
    return ~(largest.isfinite() & (largest > 0))


def mean(draws: list[Tensor]) -> Tensor:
    """The mean over the draws of a stochastic target; a single draw is returned as it is."""
    return torch.stack(draws).mean(0) if len(draws) > 1 else draws[0]
