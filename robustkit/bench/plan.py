"""What is to be measured: a list of cases, as the strings of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from robustkit.errors import ArgumentError

__all__ = ["Case", "Plan", "default_plan"]


@final
@dataclass(frozen=True)
class Case:
    """One row of the table: a model under one attack with one goal in one threat."""

    model: str
    threat: str
    attack: str
    goal: str = "misclassify"


@final
@dataclass(frozen=True)
class Plan:
    """The cases of a run, and the data that they share.

    Attributes:
        cases: In the order in which they run; those of one model stand together.
        data: Data spec.
        offset: How many examples to pass over.
        limit: How many to take from there; None takes all.
        seed: Of all noise.
        batch_size: The most images that go through a model at once.
        device: Where the models run.
    """

    cases: tuple[Case, ...]
    data: str
    offset: int = 0
    limit: int | None = None
    seed: int = 0
    batch_size: int = 100
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("offset", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ArgumentError(f"{name}={value} must be at least {least}; leave it out for the default")
        if not self.cases:
            raise ArgumentError("the plan holds no case; name a model, a threat and an attack")


_MODELS = ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")
_ATTACKS = (("fgsm", "misclassify"), ("fgsm", "least-likely"), ("ifgsm", "misclassify"), ("pgd", "misclassify"))


def default_plan() -> Plan:
    """What a bare `robustkit bench` runs: two models of real digits, four attacks, 1,000 held-out images."""
    return Plan(tuple(Case(model, "linf:0.3", attack, goal) for model in _MODELS for attack, goal in _ATTACKS), "mnist-5k")
