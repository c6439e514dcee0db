"""Products with the Jacobian of a layer of a model; the matrix itself is never formed."""

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
    """The Jacobian of a row-wise function at the points x, as a linear map: `jvp` and `vjp`.

    Entries of products that are not finite are returned as zero; rows of `vjp` without a signal are counted as flat.

    Args:
        fn: (N, *S) -> (N, *H), row by row.
        x: The points, (N, *S).
        charge: Called with the number of forwards and of backwards of each row, and with which rows are flat, (N,) or 0.
    """

    def __init__(self, fn: Callable[[Tensor], Tensor], x: Tensor, charge: Callable[[int, int, Tensor | int], None]) -> None:
        self._fn, self._x, self._charge = fn, x.detach(), charge
        charge(1, 0, 0)
        try:
            out, vjp, *_ = torch.func.vjp(fn, self._x)
        except RuntimeError:  # torch.func refuses a torch.autograd.Function of the older form
            self._x.requires_grad_()
            with torch.enable_grad():
                out, vjp = fn(self._x), None
        self._out: Tensor = out
        self._func_vjp: Callable[[Tensor], tuple[Tensor]] | None = vjp

    def jvp(self, tangent: Tensor) -> Tensor:
        """J v for a direction of the input, (N, *S) or one for all rows (1, *S) -> (N, *H)."""
        self._charge(1, 0, 0)
        tangent = tangent.to(self._x).expand_as(self._x).contiguous()
        return self._jvp(tangent).detach().nan_to_num(0.0, 0.0, 0.0)

    def _jvp(self, tangent: Tensor) -> Tensor:
        if self._func_vjp is None:
            with torch.enable_grad():  # J v is the derivative of the linear map u -> J^T u, transposed and applied to v
                cotangent = torch.zeros_like(self._out, requires_grad=True)
                product = self._vjp(cotangent, create_graph=True)
                (grad,) = torch.autograd.grad(product, cotangent, tangent, allow_unused=True)
            return torch.zeros_like(self._out) if grad is None else grad
        try:
            with warnings.catch_warnings():  # the first use of torch.func.jvp warns about torch's own internals
                warnings.simplefilter("ignore", DeprecationWarning)
                out_tangent: Tensor = torch.func.jvp(self._fn, (self._x,), (tangent,))[1]
        except NotImplementedError:  # an operation without forward-mode derivative: the transpose of the transpose
            _, transpose, *_ = torch.func.vjp(self._vjp, torch.zeros_like(self._out))
            (out_tangent,) = transpose(tangent)
        return out_tangent

    def vjp(self, cotangent: Tensor) -> Tensor:
        """J^T u for weights of the output, (N, *H) -> (N, *S)."""
        product = self._vjp(cotangent).detach()
        largest = abs_max(product)
        self._charge(0, 1, (~(largest.isfinite() & (largest > 0))).long())
        return product.nan_to_num(0.0, 0.0, 0.0)

    def _vjp(self, cotangent: Tensor, *, create_graph: bool = False) -> Tensor:
        if self._func_vjp is not None:
            return self._func_vjp(cotangent)[0]
        if not self._out.requires_grad:
            return torch.zeros_like(self._x)
        (product,) = torch.autograd.grad(
            self._out, self._x, cotangent, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(self._x) if product is None else product
