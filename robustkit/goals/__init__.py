"""WHAT SUCCESS IS: a loss that attacks descend, and the fact that they want to bring about. One file a kind of model."""

from robustkit.goals.classification import ClassifyAs, Misclassify, least_likely
from robustkit.goals.goal import Goal, Out

__all__ = ["ClassifyAs", "Goal", "Misclassify", "Out", "least_likely"]
