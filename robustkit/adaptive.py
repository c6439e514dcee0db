"""Adaptive attacks on defences without a useful derivative: BPDA, and expectation over transformation (EOT)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from robustkit._engine.field_checks import at_least
from robustkit._engine.introspection import generators_of
from robustkit.errors import ArgumentError, ShapeError
from robustkit.target import Fn

__all__ = ["Reduce", "bpda", "eot", "mean_output", "mean_probability"]

Reduce = Callable[[Tensor], Tensor]  # the outputs of all draws (K, N, ...) -> (N, ...)


def bpda(forward: Fn, backward: Fn | None = None) -> Fn:
    """Backward pass differentiable approximation: the values of `forward` with the derivative of `backward`.

    The values equal those of `forward` bit for bit, unlike those of the straight-through sum `b + (f - b).detach()`. The
    derivative is that of `backward`, in reverse and forward mode, of any order, under autograd and `torch.func`.
    Parameters inside `forward` get no gradient. When gradients are disabled, `backward` is not run.

    Args:
        forward: The deployed function, (N, *S) -> (N, ...), differentiable or not; its output is one tensor.
        backward: A smooth approximation of `forward` with the same output shape; None is the identity.

    Returns:
        A function (N, *S) -> (N, ...); it can be pickled if `forward` and `backward` can.

    Raises:
        ArgumentError: `forward` or `backward` is not a function.
        ShapeError: When called: the two outputs have different shapes.

    Source: Athalye, Carlini & Wagner 2018, section 4.1 (https://arxiv.org/abs/1802.00420).
    """
    for name, value in (("forward", forward), ("backward", backward)):
        if not callable(value) and (name == "forward" or value is not None):
            raise ArgumentError(f"{name}={value!r} must be a function on batches, such as a module or a bound method")
    return partial(_bpda_forward, forward, backward)


def _bpda_forward(forward: Fn, backward: Fn | None, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        value: Tensor = forward(x)
        return value
    with torch.no_grad():
        value = forward(x)
    approximation = x if backward is None else backward(x)
    if value.shape != approximation.shape:
        rule = "is the identity" if backward is None else f"gives {tuple(approximation.shape)}"
        raise ShapeError(f"forward gives {tuple(value.shape)} where backward {rule}; both must give the same shape")
    out: Tensor = _ValueWithGradientOf.apply(value, approximation)  # type: ignore[no-untyped-call]
    return out


@final
class _ValueWithGradientOf(torch.autograd.Function):
    """The value of the first argument with the gradient of the second."""

    generate_vmap_rule = True

    # Any: torch has no public type for contexts.

    @staticmethod
    def forward(value: Tensor, approximation: Tensor) -> Tensor:
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


def mean_output(outs: Tensor) -> Tensor:
    """The mean over the draws, (K, N, ...) -> (N, ...): of logits, of embeddings, of images."""
    return outs.mean(0)


def mean_probability(outs: Tensor) -> Tensor:
    """The logarithm of the mean softmax probability over the draws, logits (K, N, C) -> logits (N, C).

    Its cross-entropy is minus the logarithm of the mean probability: the loss of a soft-voting classifier.

    Source: Salman et al. 2019, the objective of their attack on smoothed classifiers (https://arxiv.org/abs/1906.04584).
    """
    return torch.log_softmax(outs, 2).logsumexp(0) - math.log(len(outs))


def eot(fn: Fn, draws: int, reduce: Reduce = mean_output, *, most: int = 1024) -> Fn:
    """Expectation over transformation: a view of a random function that returns the average of several draws.

    Use it as `Target(fn, views={"eot": eot(fn, 20)})`; success is still evaluated on single draws of `fn`. The derivative
    is that of the average. It matters what is averaged:

    - `Target(fn, draws=20)` averages the losses and their gradients, E[loss(fn(x))], as the source does. The draws run one
      after the other, and each counts as a forward and a backward.
    - `eot(fn, 20)` averages the outputs, loss(E[fn(x)]): draws on which the loss alone would be flat, since the output is
      confident, still contribute a gradient.
    - `eot(fn, 20, mean_probability)` averages the probabilities: -log E[p] is the loss of a soft-voting classifier.

    For a loss that is linear in the output the first two are equal. All draws run in one batch, and a call counts as one
    forward and one backward whatever the number of draws.

    Args:
        fn: A random function, (N, *S) -> (N, ...), whose output is one tensor. Each row must have its own random numbers: a
            function that draws once per batch would give identical draws.
        draws: Number of outputs to average.
        reduce: Combines the outputs of all draws, (K, N, ...) -> (N, ...).
        most: The most rows that go through `fn` at once. If that takes several batches, only the graph of one is held: each
            batch is recomputed with the same random numbers in the backward pass (gradient checkpointing). If `fn` holds
            random generators of its own, which cannot be rewound, all graphs are held.

    Returns:
        A function (N, *S) -> (N, ...); it can be pickled if `fn` and `reduce` can.

    Raises:
        ArgumentError: `fn` or `reduce` is not a function, or `draws` or `most` is not an integer of at least 1.
        ShapeError: When called: the output of `fn` is not one tensor with a row for each row of its input.

    Source: Athalye, Engstrom, Ilyas & Kwok 2018, section 2 (https://arxiv.org/abs/1707.07397).
    """
    for name, value in (("fn", fn), ("reduce", reduce)):
        if not callable(value):
            raise ArgumentError(f"{name}={value!r} must be a function")
    at_least(1, draws=draws, most=most)
    return partial(_eot_forward, fn, draws, reduce, most)


def _eot_forward(fn: Fn, draws: int, reduce: Reduce, most: int, x: Tensor) -> Tensor:
    rows = torch.arange(len(x) * draws, device=x.device) // draws  # the draws of an example are consecutive
    batches = torch.split(rows, most)
    recompute = len(batches) > 1 and torch.is_grad_enabled() and x.requires_grad and not generators_of(fn)
    call = _call_checkpointed if recompute else _call
    out = torch.cat([call(fn, x, batch) for batch in batches])
    return reduce(out.reshape(len(x), draws, *out.shape[1:]).transpose(0, 1))  # (N * K, ...) -> (K, N, ...)


def _call(fn: Fn, x: Tensor, rows: Tensor) -> Tensor:
    """`fn(x[rows])`, with its shape checked."""
    out = fn(x[rows])
    if not isinstance(out, Tensor) or out.shape[:1] != rows.shape:
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"fn gives {given} for {len(rows)} rows; an average needs one tensor with a row for each of them")
    return out


def _call_checkpointed(fn: Fn, x: Tensor, rows: Tensor) -> Tensor:
    """`_call` without storing the graph; the backward pass recomputes it with the same random numbers.

    `checkpoint` restores torch's generators; those of numpy and Python are restored here.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _fork_rng_from(numpy_state, python_state)

    out: Tensor = checkpoint(_call, fn, x, rows, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def _fork_rng_from(numpy_state: Any, python_state: Any) -> Iterator[None]:  # Any: these states have no public type
    """A context in which the global generators of numpy and Python start from these states; they are restored on exit."""
    numpy_before, python_before = np.random.get_state(), random.getstate()
    np.random.set_state(numpy_state)
    random.setstate(python_state)
    try:
        yield
    finally:
        np.random.set_state(numpy_before)
        random.setstate(python_before)
