"""Exact answers inside a ball and a box at once, by sorting; all arguments are non-negative matrices (N, D) in float64.

With x in the box, a coordinate can move by at most its `room` in the wanted direction, and the sign of the move is
known beforehand. Three problems are left, each with a closed form between two neighbouring breakpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["l1_nearest", "l1_steepest", "l2_steepest"]


def l1_nearest(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The nearest z to `size` with 0 <= z <= room and sum(z) <= eps, for eps (N, 1).

    z = min(max(size - t, 0), room) for one threshold t a row; its sum falls piecewise linearly in t, with a break where
    a coordinate leaves its room (size - room) and one where it reaches zero (size). Croce & Hein 2021, "Mind the box",
    Proposition 2.1 (https://arxiv.org/abs/2103.01208).
    """
    free = torch.minimum(size, room)
    total = free.sum(1, keepdim=True)
    breaks, order = torch.cat([(size - room).clamp(min=0), size], 1).sort(1)
    slope = torch.cat([-torch.ones_like(size), torch.ones_like(size)], 1).gather(1, order).cumsum(1)
    drop = (slope[:, :-1] * breaks.diff(dim=1)).cumsum(1)
    sums = torch.cat([total, total + drop], 1)  # sum(z) with the threshold at each break, falling
    last = ((sums > eps).sum(1, keepdim=True) - 1).clamp(min=0)
    excess = (sums.gather(1, last) - eps) / -slope.gather(1, last).clamp(max=-1)
    threshold = breaks.gather(1, last) + excess
    return torch.where(total <= eps, free, torch.minimum((size - threshold).clamp(min=0), room))


def l1_steepest(weight: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The d with 0 <= d <= room and sum(d) <= eps that makes sum(weight * d) largest: a fractional knapsack."""
    weight, order = weight.sort(1, descending=True)
    room = torch.where(weight > 0, room.gather(1, order), 0)
    spent = _before(room)
    taken = torch.minimum(room, (eps - spent).clamp(min=0))
    return torch.zeros_like(taken).scatter(1, order, taken)


def l2_steepest(weight: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The d with 0 <= d <= room and |d|_2 <= eps that makes sum(weight * d) largest.

    d = min(t * weight, room) for one scale t a row (the optimality conditions); coordinates reach their room in the
    order of room / weight, and between two of these |d|^2 is a parabola in t.
    """
    moves = weight > 0
    room = torch.where(moves, room, 0)
    full_at, order = torch.where(moves, room / weight, torch.inf).sort(1)
    squares = torch.gather(room**2, 1, order)
    full = _before(squares)  # |d|^2 of the coordinates that are full before this one
    left = torch.gather(weight**2, 1, order).flip(1).cumsum(1).flip(1)
    grown = torch.where(full_at.isinf(), torch.inf, full + full_at**2 * left)  # |d|^2 when this one becomes full
    first = (grown < eps**2).sum(1, keepdim=True).clamp(max=weight.shape[1] - 1)
    scale = ((eps**2 - full.gather(1, first)).clamp(min=0) / left.gather(1, first)).sqrt()
    everything = room.square().sum(1, keepdim=True) <= eps**2
    return torch.where(everything, room, torch.minimum(torch.where(moves, scale * weight, 0), room))


def _before(x: Tensor) -> Tensor:
    """The sum of all earlier columns; subtracting from the running sum would not do where a column is infinite."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1].cumsum(1)], 1)
