"""Gradient descent on the loss of a problem: the loop, the cosine schedule of its steps, and the best point so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import final

import torch
from torch import Tensor

from robustkit._engine.tensors import expand_rows
from robustkit.problem import Problem

__all__ = ["BestPoint", "Observer", "UpdateRule", "cosine_decay", "gradient_descent"]

UpdateRule = Callable[[int, Tensor, Tensor], Tensor]  # step number, points (N, *S), gradients (N, *S) -> next points (N, *S)
Observer = Callable[[Tensor, Tensor], object]  # points (N, *S), losses (N,); `BestPoint.update` is one


def cosine_decay(step: int, steps: int) -> float:
    """The factor on the step size at step 0, 1, ... steps - 1: half a period of a cosine, from one towards zero."""
    return (1 + math.cos(math.pi * step / steps)) / 2


@final
class BestPoint:
    """The point of lowest loss so far for each example. Of equal losses the first is kept; a NaN is never better.

    Attributes:
        x_adv: The points, (N, *S).
        loss: The losses there, (N,).
    """

    def __init__(self, x_adv: Tensor, loss: Tensor | None = None) -> None:
        """Start from points and their losses; without losses, any finite loss is better."""
        self.x_adv = x_adv
        self.loss = x_adv.new_full((len(x_adv),), torch.inf) if loss is None else loss

    def __getitem__(self, rows: Tensor) -> BestPoint:
        """The best points of the examples `rows`, indices (M,) or a mask (N,)."""
        return BestPoint(self.x_adv[rows], self.loss[rows])

    def update(self, x_adv: Tensor, loss: Tensor, rows: Tensor | None = None) -> None:
        """Keep the points (M, *S) whose loss (M,) is lower: those of the examples `rows` (M,), each at most once, or of all."""
        best = self if rows is None else self[rows]
        lower = loss < best.loss
        x_adv = torch.where(expand_rows(lower, x_adv), x_adv, best.x_adv)
        loss = torch.where(lower, loss.to(best.loss), best.loss)
        self.x_adv = x_adv if rows is None else self.x_adv.index_copy(0, rows, x_adv)
        self.loss = loss if rows is None else self.loss.index_copy(0, rows, loss)


def gradient_descent(
    problem: Problem,
    x_adv: Tensor,
    steps: Iterable[int],
    update: UpdateRule,
    observe: Observer | None = None,
    active: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Query loss and gradient, report the loss to `observe`, and move to where `update` says, once per step.

    Args:
        problem: Its loss is minimised; each step is one call of `loss_and_grad`.
        x_adv: The first points, (N, *S).
        steps: The step numbers: `problem.steps(count)`, which ends when all examples are solved, or `range(count)`.
        update: The update rule. The order of its operations is its own; it may keep state, such as a momentum.
        observe: Is called with the points and their losses before each update.
        active: Maps a step number to the examples that make this step, (N,) bool. The others are not queried, keep their
            points and have an infinite loss. The descent ends at a step that no example makes.

    Returns:
        The last points, (N, *S); their loss has not been queried.
    """
    for step in steps:
        moves = None if active is None else active(step)
        if moves is None:
            loss, grad = problem.loss_and_grad(x_adv)
        elif moves.any():
            loss, grad = _query_active(problem, x_adv, moves)
        else:
            break
        if observe is not None:
            observe(x_adv, loss)
        x_next = update(step, x_adv, grad)
        x_adv = x_next if moves is None else torch.where(expand_rows(moves, x_adv), x_next, x_adv)
    return x_adv


def _query_active(problem: Problem, x_adv: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (N,) and gradient (N, *S) of the active examples; infinite and zero for the others."""
    rows = active.nonzero().squeeze(1)
    loss, grad = problem[rows].loss_and_grad(x_adv[rows])
    return x_adv.new_full(active.shape, torch.inf).index_copy(0, rows, loss), torch.zeros_like(x_adv).index_copy(0, rows, grad)
