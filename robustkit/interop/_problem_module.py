"""Wrap a problem as a torch module, so that attacks of other libraries can query it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.tensors import expand_rows
from robustkit.errors import ShapeError
from robustkit.problem import Problem

__all__ = ["PartialBatchError", "ProblemModule", "group_by_eps", "replace_non_finite"]


class PartialBatchError(ShapeError):
    """An attack queried some of the examples of its batch alone, so the queries cannot be charged to examples."""


@final
class ProblemModule(nn.Module):
    """A module whose forward and backward passes are answered and counted by a problem.

    Gradients reach only the input: `loss.backward()` in the other library leaves none on the model's parameters.

    Args:
        problem: The examples under attack. The output is that of the deployed function, or of the adversary's view where
            the input requires a gradient.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem, self.training = problem, False

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for k points per example, (k * N, *S) -> (k * N, C); row i belongs to example i % N.

        Raises:
            PartialBatchError: The number of rows is not a multiple of N, so the queries cannot be charged to examples.
        """
        n, device = len(self._problem), x.device
        if len(x) % n:
            raise PartialBatchError(
                f"the attack queried {len(x)} points for a batch of {n} examples: the number must be a multiple of {n}, so "
                "that queries can be charged to examples; use Target(batch_size=1)"
            )
        predict = _differentiable_predict if x.requires_grad and torch.is_grad_enabled() else Problem.predict
        x = x.to(self._problem.x)
        if len(x) == n:
            return predict(self._problem, x).to(device)
        # In chunks of the target's batch size: an attack on one example may query hundreds of points at once.
        size = max(n, self._problem.batch_size // n * n)
        owner = torch.arange(len(x), device=x.device) % n  # the example of each row
        parts = [predict(self._problem[owner[i : i + size]], x[i : i + size]) for i in range(0, len(x), size)]
        return torch.cat(parts).to(device)


def _differentiable_predict(problem: Problem, x: Tensor) -> Tensor:
    out: Tensor = _Predict.apply(x, problem)  # type: ignore[no-untyped-call]
    return out


class _Predict(torch.autograd.Function):
    """The output of a problem; the backward pass is the problem's own VJP, so it is counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem) -> Tensor:  # Any: torch gives contexts no public type
        out, ctx.vjp = problem.predict_and_vjp(x)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.vjp(grads[0]), None


def group_by_eps(problem: Problem) -> Iterator[tuple[float, Tensor]]:
    """Yield each eps with the indices of the unsolved examples that have it; other libraries take one eps per call."""
    eps = torch.as_tensor(problem.threat.eps, dtype=torch.float64, device=problem.x.device).expand(len(problem))
    unsolved = problem.unsolved.clone()
    for value in sorted(set(eps[unsolved].tolist())):
        yield value, ((eps == value) & unsolved).nonzero().squeeze(1)


def replace_non_finite(x_adv: Tensor, x: Tensor) -> Tensor:
    """Return `x_adv`, with x for the examples in which `x_adv` is not finite."""
    return torch.where(expand_rows(x_adv.isfinite().flatten(1).all(1), x_adv), x_adv, x)
