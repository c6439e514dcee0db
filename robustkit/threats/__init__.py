"""Threat models: a ball of some norm around each input, intersected with the box of valid inputs; one file per norm."""

from robustkit.threats.l1 import L1
from robustkit.threats.l2 import L2
from robustkit.threats.linf import Linf
from robustkit.threats.pixels import Pixels
from robustkit.threats.threat import Threat

__all__ = ["L1", "L2", "Linf", "Pixels", "Threat"]
