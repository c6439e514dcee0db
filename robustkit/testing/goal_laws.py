"""The laws of a goal: loss and success by row, and parts that add up to the whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit.goals import Goal, Out
from robustkit.testing._runs import holds

__all__ = ["check_goal"]


def check_goal(goal: Goal, cases: Any, *, examples: int | None = None) -> int:  # Any: a hypothesis strategy
    """Check the laws of `goal` on generated outputs and references.

    Args:
        goal: The goal to check.
        cases: A hypothesis strategy of pairs (out, ref): a tensor (N, ...) or a tuple of such, and a tensor (N, ...).
        examples: Cases for each law; default that of the active hypothesis profile.

    Returns:
        How many cases were run.

    Raises:
        AssertionError: A law does not hold; hypothesis shows the smallest case.
    """

    return sum(holds(law, goal, cases, examples) for law in (answers_by_row, parts_add_up, loss_has_a_gradient))


def answers_by_row(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """Loss (N,) and success (N,) bool; a row is answered as it would be alone."""
    out, ref = case
    loss, success = goal.loss(out, ref), goal.success(out, ref)
    assert loss.shape == success.shape == ref.shape[:1], (loss.shape, success.shape)
    assert loss.is_floating_point(), loss.dtype
    assert success.dtype == torch.bool, success.dtype
    for rows in torch.arange(len(ref)).unsqueeze(1):
        alone, wanted = _rows(out, rows), ref[rows]
        assert torch.allclose(goal.loss(alone, wanted), loss[rows], rtol=1e-5, equal_nan=True)
        assert torch.equal(goal.success(alone, wanted), success[rows])


def parts_add_up(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """The goal is reached exactly where one of its parts is."""
    out, ref = case
    reached = torch.stack([part.success(out, wanted) for part, wanted in goal.parts(out, ref)]).any(0)
    assert torch.equal(reached, goal.success(out, ref))


def loss_has_a_gradient(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """The loss can be descended: it has a finite gradient."""
    out, ref = case
    leaf = _map(out, lambda o: o.detach().clone().requires_grad_())
    leaves = leaf if isinstance(leaf, tuple) else (leaf,)
    grads = torch.autograd.grad(goal.loss(leaf, ref).sum(), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    assert any(g is not None for g in grads)


def _map(out: Out, change: Any) -> Out:
    return tuple(change(part) for part in out) if isinstance(out, tuple) else change(out)


def _rows(out: Out, rows: Tensor) -> Out:
    return _map(out, lambda part: part[rows])
