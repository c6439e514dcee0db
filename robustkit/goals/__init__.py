"""Goals: a loss that attacks minimise, and the condition that counts as success; one file per kind of model."""

from robustkit.goals.classification import ClassifyAs, Misclassify, least_likely
from robustkit.goals.goal import Goal, Out

__all__ = ["ClassifyAs", "Goal", "Misclassify", "Out", "least_likely"]
