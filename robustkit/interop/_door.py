"""A problem in the shape of a torch module, so that an attack of another library can ask it questions."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from robustkit.errors import ShapeError
from robustkit.problem import Problem

__all__ = ["Door"]


@final
class Door(nn.Module):
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
        """The answers to k points for each of the N examples, (k * N, *S) -> (k * N, C); N rows at a time.

        Raises:
            ShapeError: The number of rows is no multiple of N, so that nobody knows whom to charge.
        """
        n = len(self._problem)
        if len(x) % n:
            raise ShapeError(
                f"the attack asks about {len(x)} points while {n} examples are attacked at once; the queries of an attack "
                "that takes some of the examples alone can be counted with Target(batch_size=1)"
            )
        ask = _answer if x.requires_grad and torch.is_grad_enabled() else Problem.answer
        return torch.cat([ask(self._problem, x[first : first + n]) for first in range(0, len(x), n)])


def _answer(problem: Problem, x: Tensor) -> Tensor:
    out: Tensor = _Answer.apply(x, problem)  # type: ignore[no-untyped-call]
    return out


class _Answer(torch.autograd.Function):
    """The answer of a problem; the way back is the problem's own, so it is counted and touches nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, problem: Problem) -> Tensor:  # Any: torch gives contexts no public type
        out, ctx.pull = problem.answer_and_pull(x)
        return out.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.pull(grads[0]), None
