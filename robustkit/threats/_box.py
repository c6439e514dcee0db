"""Exact solutions on the intersection of a ball and a box, by sorting; all matrices are (N, D) float64, not negative.

With x in the box, each coordinate can move by at most its `room` in the given direction, and the sign of the move is known.
Three problems remain, each with a closed form between two neighbouring breakpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["l1_nearest", "l1_steepest", "l2_steepest"]


def l1_nearest(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The nearest z to `size` with 0 <= z <= room and sum(z) <= eps, for eps (N, 1).

    z = min(max(size - t, 0), room) for one threshold t per row. Its sum decreases piecewise linearly in t, with a breakpoint
    where a coordinate falls below its room (size - room) and one where it reaches zero (size). Croce & Hein 2021, "Mind the
    box", Proposition 2.1 (https://arxiv.org/abs/2103.01208).
    """
    clipped = torch.minimum(size, room)
    total = clipped.sum(1, keepdim=True)
    breakpoints, order = torch.cat([(size - room).clamp(min=0), size], 1).sort(1)
    slope = torch.cat([-torch.ones_like(size), torch.ones_like(size)], 1).gather(1, order).cumsum(1)
    change = (slope[:, :-1] * breakpoints.diff(dim=1)).cumsum(1)
    sums = torch.cat([total, total + change], 1)  # sum(z) with the threshold at each breakpoint, decreasing
    segment = ((sums > eps).sum(1, keepdim=True) - 1).clamp(min=0)
    offset = (sums.gather(1, segment) - eps) / -slope.gather(1, segment).clamp(max=-1)
    threshold = breakpoints.gather(1, segment) + offset
    return torch.where(total <= eps, clipped, torch.minimum((size - threshold).clamp(min=0), room))


def l1_steepest(weight: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The d with 0 <= d <= room and sum(d) <= eps that maximises sum(weight * d): a fractional knapsack."""
    weight, order = weight.sort(1, descending=True)
    room = torch.where(weight > 0, room.gather(1, order), 0)
    spent = _exclusive_cumsum(room)
    sorted_d = torch.minimum(room, (eps - spent).clamp(min=0))
    return torch.zeros_like(sorted_d).scatter(1, order, sorted_d)


def l2_steepest(weight: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The d with 0 <= d <= room and |d|_2 <= eps that maximises sum(weight * d).

    d = min(t * weight, room) for one scale t per row (the optimality conditions). Coordinates saturate, that is reach their
    room, in the order of room / weight; between two of these breakpoints |d|^2 is quadratic in t.
    """
    active = weight > 0
    room = torch.where(active, room, 0)
    breakpoints, order = torch.where(active, room / weight, torch.inf).sort(1)  # the t at which each coordinate saturates
    squares = torch.gather(room**2, 1, order)
    saturated = _exclusive_cumsum(squares)  # |d|^2 of the coordinates that saturate before this one
    remaining = torch.gather(weight**2, 1, order).flip(1).cumsum(1).flip(1)  # |weight|^2 of this one and all later ones
    norm_squared = torch.where(breakpoints.isinf(), torch.inf, saturated + breakpoints**2 * remaining)  # at each breakpoint
    segment = (norm_squared < eps**2).sum(1, keepdim=True).clamp(max=weight.shape[1] - 1)
    scale = ((eps**2 - saturated.gather(1, segment)).clamp(min=0) / remaining.gather(1, segment)).sqrt()
    all_saturated = room.square().sum(1, keepdim=True) <= eps**2
    return torch.where(all_saturated, room, torch.minimum(torch.where(active, scale * weight, 0), room))


def _exclusive_cumsum(x: Tensor) -> Tensor:
    """The sum of all earlier columns; `cumsum - x` would give NaN where a column is infinite."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1].cumsum(1)], 1)
