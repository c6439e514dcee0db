"""How robust is a model, really? An Attack solves a Problem: a Target, a Goal and a Threat."""

from robustkit.attack import Attack
from robustkit.attacks import FGSM, MIFGSM, PGD
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
    "Goal",
    "Linf",
    "Misclassify",
    "Normalize",
    "Pixels",
    "Problem",
    "Result",
    "Target",
    "Threat",
]
