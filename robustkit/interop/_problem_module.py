"""A problem in the shape of a torch module, so that an attack of another library can ask it questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit._engine.tensors import expand_rows
from robustkit.errors import ShapeError
from robustkit.problem import Problem

__all__ = ["ProblemModule", "SomeRowsError", "by_budget", "finite"]


class SomeRowsError(ShapeError):
    """An attack asks about some of its examples alone, so that nobody knows whom to charge."""


@final
class ProblemModule(nn.Module):
    """Every pass of a foreign attack goes through here, forwards and backwards, and is counted by the problem.

    What is differentiated through the door reaches the input alone: `loss.backward()` on the far side leaves no gradient
    on the model's parameters.

    Args:
        problem: The examples under attack; their deployed function answers, or the adversary's view where the input
            requires a gradient.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._problem, self.training = problem, False

    def forward(self, x: Tensor) -> Tensor:
        """The answers to k points for each of the N examples, all N of them k times over, (k * N, *S) -> (k * N, C).

        Raises:
            SomeRowsError: The number of rows is no multiple of N, so that nobody knows whom to charge.
        """
        n, where = len(self._problem), x.device
        if len(x) % n:
            raise SomeRowsError(
                f"the attack asks about {len(x)} points while {n} examples are attacked at once; the queries of an attack "
                "that takes some of the examples alone can be counted with Target(batch_size=1)"
            )
        ask = _answer if x.requires_grad and torch.is_grad_enabled() else Problem.predict
        x = x.to(self._problem.x)
        if len(x) == n:
            return ask(self._problem, x).to(where)
        # As many at once as the target allows: an attack on one example may ask about hundreds of points.
        size = max(n, self._problem.batch_size // n * n)
        everyone = torch.arange(len(x), device=x.device) % n
        parts = [ask(self._problem[everyone[i : i + size]], x[i : i + size]) for i in range(0, len(x), size)]
        return torch.cat(parts).to(where)


def _answer(problem: Problem, x: Tensor) -> Tensor:
    out: Tensor = _Answer.apply(x, problem)  # type: ignore[no-untyped-call]
    return out


class _Answer(torch.autograd.Function):
    """The answer of a problem; the way back is the problem's own, so it is counted and touches nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem) -> Tensor:  # Any: torch gives contexts no public type
        out, ctx.pull = problem.predict_and_vjp(x)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.pull(grads[0]), None


def by_budget(problem: Problem) -> Iterator[tuple[float, Tensor]]:
    """Each budget, and the open examples that have it: other libraries take one number a call."""
    eps = torch.as_tensor(problem.threat.eps, dtype=torch.float64, device=problem.x.device).expand(len(problem))
    open_before = problem.unsolved.clone()
    for value in sorted(set(eps[open_before].tolist())):
        yield value, ((eps == value) & open_before).nonzero().squeeze(1)


def finite(x_adv: Tensor, x: Tensor) -> Tensor:
    """`x_adv`, and x for the examples in which it holds what is no finite number."""
    return torch.where(expand_rows(x_adv.isfinite().flatten(1).all(1), x_adv), x_adv, x)
