"""How a layer of a model answers to small changes of its input: products with its Jacobian, which is never formed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

__all__ = ["Jacobian"]


@final
class Jacobian:
    """The derivative of a function of each row at some points, as a linear map and its transpose.

    Args:
        fn: (N, *S) -> (N, *H), row by row.
        x: Where, (N, *S).
        count: Told how many forwards and backwards each row was charged with, for every call.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor, count: Callable[[int, int], None]) -> None:
        self._fn, self._x, self._count = fn, x.detach(), count
        count(1, 0)
        said, back, *_ = torch.func.vjp(fn, self._x)
        self._said: Tensor = said
        self._back: Callable[[Tensor], tuple[Tensor]] = back

    def push(self, change: Tensor) -> Tensor:
        """J v for a change of the input, (N, *S) or one for all (1, *S) -> (N, *H)."""
        self._count(1, 0)
        change = change.to(self._x).expand_as(self._x).contiguous()
        try:
            with warnings.catch_warnings():  # torch's own, about itself, when this is first used
                warnings.simplefilter("ignore", DeprecationWarning)
                pushed: Tensor = torch.func.jvp(self._fn, (self._x,), (change,))[1]
        except NotImplementedError:  # an operation without forward differentiation: the transpose of the transpose
            _, forth, *_ = torch.func.vjp(lambda weight: self._back(weight)[0], torch.zeros_like(self._said))
            pushed = forth(change)[0]
        return pushed.detach()

    def pull(self, weight: Tensor) -> Tensor:
        """J^T u for weights of the output, (N, *H) -> (N, *S)."""
        self._count(0, 1)
        (pulled,) = self._back(weight)
        return pulled.detach()
