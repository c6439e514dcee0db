"""The largest budget: the ball that contains every valid input, whatever x."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["max_threat"]


def max_threat(threat: Threat, x: Tensor) -> Threat:
    """The same kind of threat with a budget that reaches every input in the bounds; [0, 1] where there are none."""
    low, high = threat.bounds or (0.0, 1.0)
    width, size = high - low, math.prod(x.shape[1:])
    budgets = {Linf: width, L2: width * size**0.5, L1: width * size, Pixels: math.prod(x.shape[2:])}
    return replace(threat, eps=budgets[type(threat)])
