"""The nearest point on a plane, inside the box of valid inputs: what walks along a border are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit._tensors import flat
from robustkit.threats import L2, Threat

__all__ = ["onto"]

_TRIES = 8  # of Newton's method; each fills the coordinates that the last one has overfilled
_CLOSE = 1e-5  # share of the way that may be left


def onto(threat: Threat, x: Tensor, grad: Tensor, value: Tensor) -> Tensor:
    """The smallest move from `x` inside the box to where value + grad . move is zero, (N, *S).

    A coordinate moves by t in Linf and by t times its slope in L2, as far as it has room. How much of the value they take
    together is concave and piecewise linear in t, so Newton's method comes from below and never goes too far. Where the box
    leaves too little room for the whole value, all of it is used.

    Args:
        threat: Linf or L2: what is small.
        x: Points in the box, (N, *S).
        grad: The slopes of a linear function there, (N, *S).
        value: What it is there, (N,).
    """
    x, slope, value = flat(x), flat(grad), value.unsqueeze(1)
    sign = -value.sign() * slope.sign()
    if threat.bounds is None:
        room = torch.full_like(x, torch.inf)
    else:
        room = torch.where(sign > 0, threat.bounds[1] - x, x - threat.bounds[0]).clamp(min=0)
    weight = torch.where(room > 0, slope.abs(), 0)
    pace = weight if isinstance(threat, L2) else (weight > 0).to(weight)
    wanted, time = value.abs(), torch.zeros_like(value)
    for _ in range(_TRIES):
        move = time * pace
        missing = wanted - (weight * torch.minimum(move, room)).sum(1, keepdim=True)
        speed = torch.where(move < room, weight * pace, 0).sum(1, keepdim=True)
        missing = torch.where(speed > 0, missing, 0)
        if not (missing > _CLOSE * wanted).any():
            break
        time = time + missing.clamp(min=0) / torch.where(speed > 0, speed, 1)
    return (sign * torch.minimum(time * pace, room).nan_to_num(0.0)).reshape(grad.shape)
