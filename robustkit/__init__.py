"""How robust is a model, really? An Attack solves a Problem: a Target, a Goal and a Threat."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustkit.attack import Attack
    from robustkit.attacks import FGSM, MIFGSM, PGD, OnePixel, PixelSearch, Standard, UniversalPGD
    from robustkit.bench.evaluate import Report, evaluate
    from robustkit.defence import Defence
    from robustkit.goals import ClassifyAs, Goal, Misclassify
    from robustkit.normalize import Normalize
    from robustkit.problem import Problem
    from robustkit.result import Result
    from robustkit.target import Target
    from robustkit.threats import L1, L2, Linf, Pixels, Threat

__version__ = "0.1.0"

__all__ = [
    "FGSM",
    "L1",
    "L2",
    "MIFGSM",
    "PGD",
    "Attack",
    "ClassifyAs",
    "Defence",
    "Goal",
    "Linf",
    "Misclassify",
    "Normalize",
    "OnePixel",
    "PixelSearch",
    "Pixels",
    "Problem",
    "Report",
    "Result",
    "Standard",
    "Target",
    "Threat",
    "UniversalPGD",
    "evaluate",
]

_MODULES = {
    "attack": ("Attack",),
    "attacks": ("FGSM", "MIFGSM", "PGD", "OnePixel", "PixelSearch", "Standard", "UniversalPGD"),
    "bench.evaluate": ("Report", "evaluate"),
    "defence": ("Defence",),
    "goals": ("ClassifyAs", "Goal", "Misclassify"),
    "normalize": ("Normalize",),
    "problem": ("Problem",),
    "result": ("Result",),
    "target": ("Target",),
    "threats": ("L1", "L2", "Linf", "Pixels", "Threat"),
}


def __getattr__(name: str) -> Any:  # Any: any of the public names
    """Import the module of a public name on first use, because torch takes two seconds and `robustkit --help` needs none."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"robustkit.{module}"), name)
    raise AttributeError(f"module 'robustkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
