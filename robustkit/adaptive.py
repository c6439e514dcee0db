"""How an adversary who knows the defence differentiates what has no useful derivative."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from robustkit.errors import ArgumentError, ShapeError
from robustkit.target import Fn

__all__ = ["bpda"]


def bpda(forward: Fn, backward: Fn | None = None) -> Fn:
    """A function with the values of `forward` and the derivative of `backward`: backward pass differentiable approximation.

    The values are those of `forward` bit for bit, which is what a straight-through sum `b + (f - b).detach()` does not
    give. The derivative is exact for `backward`, in reverse and forward mode, of any order, under autograd and
    `torch.func`. Parameters inside `forward` get no gradient. Without gradients `backward` is not run.

    Args:
        forward: What is deployed, (N, *S) -> (N, ...), differentiable or not; one tensor comes out.
        backward: A smooth function that is close to `forward`, of the same output shape; None is the identity.

    Returns:
        A function (N, *S) -> (N, ...); it can be pickled where its parts can.

    Raises:
        ArgumentError: `forward` or `backward` is no function.
        ShapeError: When called: the two give different shapes.

    Source: Athalye, Carlini & Wagner 2018, section 4.1 (https://arxiv.org/abs/1802.00420).
    """
    for name, value in (("forward", forward), ("backward", backward)):
        if not callable(value) and (name == "forward" or value is not None):
            raise ArgumentError(f"{name}={value!r} must be a function on batches, such as a module or a bound method")
    return partial(_substituted, forward, backward)


def _substituted(forward: Fn, backward: Fn | None, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        value: Tensor = forward(x)
        return value
    with torch.no_grad():
        value = forward(x)
    close = x if backward is None else backward(x)
    if value.shape != close.shape:
        rule = "is the identity" if backward is None else f"gives {tuple(close.shape)}"
        raise ShapeError(f"forward gives {tuple(value.shape)} where backward {rule}; both must give the same shape")
    out: Tensor = _Value.apply(value, close)  # type: ignore[no-untyped-call]
    return out


@final
class _Value(torch.autograd.Function):
    """The first argument, with the second in its place when the derivative is taken."""

    generate_vmap_rule = True

    # Any: torch gives contexts no public type.

    @staticmethod
    def forward(value: Tensor, close: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].clone()
