"""The laws of a goal: loss and success are per row, and the parts cover the goal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit.goals import Goal, Out
from robustkit.testing._check_law import check_law

__all__ = ["check_goal"]


def check_goal(goal: Goal, cases: Any, *, examples: int | None = None) -> int:  # Any: a hypothesis strategy
    """Check the laws of `goal` on generated outputs and references.

    Args:
        goal: The goal to check.
        cases: A hypothesis strategy of pairs (out, ref): a tensor (N, ...) or a tuple of such, and a tensor (N, ...).
        examples: Number of cases per law; default that of the active hypothesis profile.

    Returns:
        The number of cases.

    Raises:
        AssertionError: A law is violated; hypothesis shows the smallest case.
        MissingExtraError: hypothesis is not installed.
    """

    return sum(
        check_law(law, goal, cases, examples)
        for law in (rows_are_independent, success_is_that_of_any_part, loss_has_a_finite_gradient)
    )


def rows_are_independent(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """Loss is (N,) floating point, success (N,) bool, and each row has the value that it has alone."""
    out, ref = case
    loss, success = goal.loss(out, ref), goal.success(out, ref)
    assert loss.shape == success.shape == ref.shape[:1], (loss.shape, success.shape)
    assert loss.is_floating_point(), loss.dtype
    assert success.dtype == torch.bool, success.dtype
    for rows in torch.arange(len(ref)).unsqueeze(1):
        row_out, row_ref = _select_rows(out, rows), ref[rows]
        assert torch.allclose(goal.loss(row_out, row_ref), loss[rows], rtol=1e-5, equal_nan=True)
        assert torch.equal(goal.success(row_out, row_ref), success[rows])


def success_is_that_of_any_part(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """The goal succeeds exactly where one of its parts does."""
    out, ref = case
    any_part = torch.stack([part.success(out, part_ref) for part, part_ref in goal.parts(out, ref)]).any(0)
    assert torch.equal(any_part, goal.success(out, ref))


def loss_has_a_finite_gradient(goal: Goal, case: tuple[Out, Tensor]) -> None:
    """The loss has a finite gradient with respect to the output."""
    out, ref = case
    leaf_out = _map_outputs(out, lambda o: o.detach().clone().requires_grad_())
    leaves = leaf_out if isinstance(leaf_out, tuple) else (leaf_out,)
    grads = torch.autograd.grad(goal.loss(leaf_out, ref).sum(), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in grads)
    assert any(g is not None for g in grads)


def _map_outputs(out: Out, fn: Any) -> Out:
    return tuple(fn(part) for part in out) if isinstance(out, tuple) else fn(out)


def _select_rows(out: Out, rows: Tensor) -> Out:
    return _map_outputs(out, lambda part: part[rows])
