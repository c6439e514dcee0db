"""How a layer of a model answers to small changes of its input: products with its Jacobian, which is never formed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from robustkit._engine.tensors import abs_max

__all__ = ["Jacobian"]


@final
class Jacobian:
    """The derivative of a function of each row at some points, as a linear map and its transpose.

    Derivatives that are not finite come back as zero, and rows that a transpose leaves without any signal are told.

    Args:
        fn: (N, *S) -> (N, *H), row by row.
        x: Where, (N, *S).
        count: Told how many forwards and backwards each row was charged with, and which rows, (N,), came back flat.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor, count: Callable[[int, int, Tensor | int], None]) -> None:
        self._fn, self._x, self._count = fn, x.detach(), count
        count(1, 0, 0)
        try:
            said, back, *_ = torch.func.vjp(fn, self._x)
        except RuntimeError:  # a torch.autograd.Function of the older form, which torch.func refuses
            self._x.requires_grad_()
            with torch.enable_grad():
                said, back = fn(self._x), None
        self._said: Tensor = said
        self._vjp: Callable[[Tensor], tuple[Tensor]] | None = back

    def push(self, change: Tensor) -> Tensor:
        """J v for a change of the input, (N, *S) or one for all (1, *S) -> (N, *H)."""
        self._count(1, 0, 0)
        change = change.to(self._x).expand_as(self._x).contiguous()
        return self._pushed(change).detach().nan_to_num(0.0, 0.0, 0.0)

    def _pushed(self, change: Tensor) -> Tensor:
        if self._vjp is None:
            with torch.enable_grad():
                weight = torch.zeros_like(self._said, requires_grad=True)
                (pushed,) = torch.autograd.grad(self._back(weight, twice=True), weight, change, allow_unused=True)
            return torch.zeros_like(self._said) if pushed is None else pushed
        try:
            with warnings.catch_warnings():  # torch's own, about itself, when this is first used
                warnings.simplefilter("ignore", DeprecationWarning)
                forth: Tensor = torch.func.jvp(self._fn, (self._x,), (change,))[1]
        except NotImplementedError:  # an operation without forward differentiation: the transpose of the transpose
            _, transposed, *_ = torch.func.vjp(self._back, torch.zeros_like(self._said))
            (forth,) = transposed(change)
        return forth

    def pull(self, weight: Tensor) -> Tensor:
        """J^T u for weights of the output, (N, *H) -> (N, *S)."""
        pulled = self._back(weight).detach()
        largest = abs_max(pulled)
        self._count(0, 1, (~(largest.isfinite() & (largest > 0))).long())
        return pulled.nan_to_num(0.0, 0.0, 0.0)

    def _back(self, weight: Tensor, *, twice: bool = False) -> Tensor:
        if self._vjp is not None:
            return self._vjp(weight)[0]
        if not self._said.requires_grad:
            return torch.zeros_like(self._x)
        (pulled,) = torch.autograd.grad(self._said, self._x, weight, retain_graph=True, create_graph=twice, allow_unused=True)
        return torch.zeros_like(self._x) if pulled is None else pulled
