"""How steps shrink: the schedule that descents share."""

from __future__ import annotations

import math

__all__ = ["cosine"]


def cosine(step: int, steps: int) -> float:
    """The share of the first step that is taken in step number 0, 1, ... of so many: from one down, like half a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2
