"""Projection onto a hyperplane inside the box of valid inputs: the step of boundary walks."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit._engine.tensors import abs_max, flatten_rows
from robustkit.threats import L2, Threat

__all__ = ["move_length", "project_to_hyperplane"]

_EXTREME_SLOPE = 1e-10  # slopes below this, or above its inverse, are rescaled
_NEWTON_STEPS = 8
_TOLERANCE = 1e-4  # relative change of the step length at which Newton's method ends


def move_length(threat: Threat, move: Tensor) -> Tensor:
    """The norm of each move, (N, *S) -> (N,), in the dtype of the move: for comparisons, not for the final evaluation.

    Args:
        threat: Linf or L2, which defines the norm.
        move: The moves.
    """
    lengths: Tensor = torch.linalg.vector_norm(flatten_rows(move), 2 if isinstance(threat, L2) else torch.inf, dim=1)
    return lengths


def project_to_hyperplane(threat: Threat, x: Tensor, grad: Tensor, value: Tensor) -> Tensor:
    """The smallest move from `x`, inside the box up to rounding, to the hyperplane value + grad . move = 0, (N, *S).

    With step length t, a coordinate moves by t in Linf and by t times its slope in L2, until it meets the box. The total
    decrease of the value is concave and piecewise linear in t, so Newton's method approaches the solution from below. Where
    the box does not allow the whole decrease, every coordinate moves to its bound.

    Args:
        threat: Linf or L2, which defines the norm, and the box.
        x: Points in the box, (N, *S).
        grad: The gradient of a linear function, (N, *S).
        value: Its value at `x`, (N,).
    """
    slope, value = flatten_rows(grad), value.unsqueeze(1)
    largest = abs_max(slope).unsqueeze(1)
    # Slopes whose squares would underflow or overflow are rescaled first.
    is_extreme = (largest > 0) & ((largest < _EXTREME_SLOPE) | (largest > 1 / _EXTREME_SLOPE))
    scale = torch.where(is_extreme, largest, 1)
    slope, value = slope / scale, value / scale
    sign, weight = slope.sign() * -value.sign(), slope.abs()
    speed = weight if isinstance(threat, L2) else (weight > 0).to(weight)  # of a coordinate, per unit of t
    rate, needed = weight * speed, value.abs()  # decrease per unit of t, and in total
    if threat.bounds is None:
        t = needed / rate.sum(1, keepdim=True)
        return (sign * speed * torch.where(t.isfinite(), t, 0)).reshape(grad.shape)
    low, high = threat.bounds
    # The distance to the bound ahead; where the sign is zero, nothing moves.
    room = ((low + high) / 2 - flatten_rows(x)).mul_(sign).add_((high - low) / 2).clamp_(min=0)
    t_bound, full_decrease = room / speed, room * weight  # of each coordinate: the t at its bound, and its decrease there
    infeasible = full_decrease.sum(1, keepdim=True) <= needed
    t = _solve_step_length(t_bound, full_decrease, rate, needed, infeasible)
    return (sign * torch.where(infeasible, room, torch.minimum(t * speed, room))).reshape(grad.shape)


def _solve_step_length(t_bound: Tensor, full_decrease: Tensor, rate: Tensor, needed: Tensor, infeasible: Tensor) -> Tensor:
    """The step lengths t, (N, 1), at which the coordinates (N, D) have decreased the value by `needed`, (N, 1).

    Newton's method: each step finds the coordinates that the last t moved to their bounds, and solves for the others. Rows
    that have converged or are `infeasible`, (N, 1) bool, are dropped.
    """
    t, rows = torch.zeros_like(needed), torch.arange(len(needed), device=needed.device)
    active = (~infeasible).squeeze(1).nonzero().squeeze(1)
    for _ in range(_NEWTON_STEPS):
        rows, needed = rows[active], needed[active]
        if not len(rows):
            break
        t_bound, full_decrease, rate = (values.index_select(0, active) for values in (t_bound, full_decrease, rate))
        is_free = torch.gt(t_bound, t[rows], out=torch.empty_like(t_bound))  # as numbers, which saves converting a mask
        free_rate = (rate * is_free).sum(1, keepdim=True)
        t_next = (needed - (full_decrease * (1 - is_free)).sum(1, keepdim=True)) / free_rate
        t_next = torch.where((free_rate > 0) & (t_next > t[rows]), t_next, t[rows])
        active = (t_next > (1 + _TOLERANCE) * t[rows]).squeeze(1).nonzero().squeeze(1)
        t[rows] = t_next
    return t
