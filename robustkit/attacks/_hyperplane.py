"""The nearest point on a plane, inside the box of valid inputs: what walks along a border are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit._engine.tensors import abs_max, flatten_rows
from robustkit.threats import L2, Threat

__all__ = ["move_length", "project_to_hyperplane"]

_EXTREME = 1e-10  # slopes
_TRIES = 8  # of Newton's method; each fills the coordinates that the last one has overfilled
_CLOSE = 1e-4  # share of the way that may be left


def move_length(threat: Threat, move: Tensor) -> Tensor:
    """How far each move goes, (N, *S) -> (N,), in its own type: to compare moves, not to judge them.

    Args:
        threat: Linf or L2: what is far.
        move: The moves.
    """
    lengths: Tensor = torch.linalg.vector_norm(flatten_rows(move), 2 if isinstance(threat, L2) else torch.inf, dim=1)
    return lengths


def project_to_hyperplane(threat: Threat, x: Tensor, grad: Tensor, value: Tensor) -> Tensor:
    """The smallest move from `x` inside the box, but for rounding, to where value + grad . move is zero, (N, *S).

    A coordinate moves by t in Linf and by t times its slope in L2, as far as it has room. How much of the value they take
    together is concave and piecewise linear in t, so Newton's method comes from below and never goes too far. Where the box
    leaves too little room for the whole value, all of it is used.

    Args:
        threat: Linf or L2: what is small.
        x: Points in the box, (N, *S).
        grad: The slopes of a linear function there, (N, *S).
        value: What it is there, (N,).
    """
    slope, value = flatten_rows(grad), value.unsqueeze(1)
    largest = abs_max(slope).unsqueeze(1)
    # Slopes whose squares would vanish or overflow are scaled first.
    scale = torch.where((largest > 0) & ((largest < _EXTREME) | (largest > 1 / _EXTREME)), largest, 1)
    slope, value = slope / scale, value / scale
    sign, weight = slope.sign() * -value.sign(), slope.abs()
    pace = weight if isinstance(threat, L2) else (weight > 0).to(weight)
    gain, wanted = weight * pace, value.abs()
    if threat.bounds is None:
        time = wanted / gain.sum(1, keepdim=True)
        return (sign * pace * torch.where(time.isfinite(), time, 0)).reshape(grad.shape)
    low, high = threat.bounds
    room = (
        ((low + high) / 2 - flatten_rows(x)).mul_(sign).add_((high - low) / 2).clamp_(min=0)
    )  # where the sign is zero, nothing moves
    full, most = room / pace, room * weight  # when a coordinate has no room left, and what it has given by then
    short = most.sum(1, keepdim=True) <= wanted  # all room together is not enough
    time, left = torch.zeros_like(value), torch.arange(len(value), device=value.device)
    more = (~short).squeeze(1).nonzero().squeeze(1)
    for _ in range(_TRIES):
        left, wanted = left[more], wanted[more]
        if not len(left):
            break
        full, most, gain = (values.index_select(0, more) for values in (full, most, gain))
        free = torch.gt(full, time[left], out=torch.empty_like(full))  # as numbers: a mask would have to be turned into them
        speed = (gain * free).sum(1, keepdim=True)
        later = (wanted - (most * (1 - free)).sum(1, keepdim=True)) / speed
        later = torch.where((speed > 0) & (later > time[left]), later, time[left])
        more = (later > (1 + _CLOSE) * time[left]).squeeze(1).nonzero().squeeze(1)
        time[left] = later
    return (sign * torch.where(short, room, torch.minimum(time * pace, room))).reshape(grad.shape)
