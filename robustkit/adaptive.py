"""How an adversary who knows the defence differentiates what has no useful derivative."""

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

from robustkit._engine.introspection import generators_of
from robustkit.errors import ArgumentError, ShapeError
from robustkit.target import Fn

__all__ = ["Reduce", "bpda", "eot", "mean_output", "mean_probability"]

Reduce = Callable[[Tensor], Tensor]  # the outputs of all draws (K, N, ...) -> (N, ...)


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


def mean_output(outs: Tensor) -> Tensor:
    """The mean over the draws, (K, N, ...) -> (N, ...): of logits, of embeddings, of images."""
    return outs.mean(0)


def mean_probability(outs: Tensor) -> Tensor:
    """The logarithm of the mean softmax over the draws, logits (K, N, C) -> logits (N, C).

    Its cross-entropy is minus the logarithm of the mean probability, which is the loss of a classifier that votes softly.

    Source: Salman et al. 2019, the objective of their attack on smoothed classifiers (https://arxiv.org/abs/1906.04584).
    """
    return torch.log_softmax(outs, 2).logsumexp(0) - math.log(len(outs))


def eot(fn: Fn, draws: int, reduce: Reduce = mean_output, *, most: int = 1024) -> Fn:
    """A view of a random function: what it says on average, all draws in one batch; expectation over transformation.

    For `Target(fn, views={"eot": eot(fn, 20)})`, where success is still judged on single draws of `fn`. The derivative is
    that of the average. What is averaged makes a difference:

    - `Target(fn, draws=20)` averages the losses and their gradients, E[loss(fn(x))], as the source does; its draws go
      through one after the other, and each is counted as a forward and a backward.
    - `eot(fn, 20)` averages the outputs, loss(E[fn(x)]): a draw on which the loss is flat, since the answer is clear, does
      not hush the others. Of a draw that has gone wrong already the loss asks no more.
    - `eot(fn, 20, mean_probability)` averages the probabilities: -log E[p] is the loss of a classifier that votes.

    For a loss that is linear in the output the first two are the same. A call counts as one forward and one backward,
    whatever the number of draws.

    Args:
        fn: A random function, (N, *S) -> (N, ...), one tensor. Each row draws for itself: of a function that draws once for
            the whole batch all draws would be the same.
        draws: How many outputs are averaged.
        reduce: Makes one output of those of all draws, (K, N, ...) -> (N, ...).
        most: The most rows that go through `fn` at once. Where that takes several goes, the graph of one at a time is held:
            each runs once more, on the same draws, when the derivative is taken. Of a function with random generators of
            its own, which cannot be wound back, all graphs are held.

    Returns:
        A function (N, *S) -> (N, ...); it can be pickled where its parts can.

    Raises:
        ArgumentError: `fn` or `reduce` is no function, `draws` or `most` no whole number from 1 on.
        ShapeError: When called: `fn` does not give one tensor with a row for each row of its input.

    Source: Athalye, Engstrom, Ilyas & Kwok 2018, section 2 (https://arxiv.org/abs/1707.07397).
    """
    for name, value in (("fn", fn), ("reduce", reduce)):
        if not callable(value):
            raise ArgumentError(f"{name}={value!r} must be a function")
    for name, count in (("draws", draws), ("most", most)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError(f"{name}={count!r} must be a whole number, at least 1")
    return partial(_expected, fn, draws, reduce, most)


def _expected(fn: Fn, draws: int, reduce: Reduce, most: int, x: Tensor) -> Tensor:
    rows = torch.arange(len(x) * draws, device=x.device) // draws  # the draws of an example side by side
    parts = torch.split(rows, most)
    lean = len(parts) > 1 and torch.is_grad_enabled() and x.requires_grad and not generators_of(fn)
    out = torch.cat([_again(fn, x, part) if lean else _drawn(fn, x, part) for part in parts])
    return reduce(out.reshape(len(x), draws, *out.shape[1:]).transpose(0, 1))  # (N * K, ...) -> (K, N, ...)


def _drawn(fn: Fn, x: Tensor, rows: Tensor) -> Tensor:
    out = fn(x[rows])
    if not isinstance(out, Tensor) or out.shape[:1] != rows.shape:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(f"fn gives {found} for {len(rows)} rows; an average needs one tensor with a row for each of them")
    return out


def _again(fn: Fn, x: Tensor, rows: Tensor) -> Tensor:
    """The same without its graph, which is made anew when the derivative is taken; torch winds back its own generators."""
    numbers, python = np.random.get_state(), random.getstate()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _wound_back(numbers, python)

    out: Tensor = checkpoint(_drawn, fn, x, rows, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def _wound_back(numbers: Any, python: Any) -> Iterator[None]:  # Any: states of the global generators of numpy and Python
    before = np.random.get_state(), random.getstate()
    np.random.set_state(numbers)
    random.setstate(python)
    try:
        yield
    finally:
        np.random.set_state(before[0])
        random.setstate(before[1])
