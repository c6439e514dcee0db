"""The base class of universal attacks: one perturbation is learned from many examples, then added to each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from robustkit.attack import Attack
from robustkit.attacks.universal.perturbation import Perturbation
from robustkit.errors import ArgumentError
from robustkit.goals import Goal, Misclassify
from robustkit.problem import Problem
from robustkit.target import Fn, Target
from robustkit.threats import L2, Linf, Threat

__all__ = ["UniversalAttack", "random_order", "shuffled_batches", "success_rate"]


class UniversalAttack(Attack):
    """Learns one perturbation (1, *S) that reaches the goal on as many examples as possible.

    Called like any attack, it learns from the examples that it is evaluated on, so its success rate is optimistic; `learn`
    returns the learned perturbation, to be evaluated on other examples.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)
    universal: ClassVar[bool] = True

    @abstractmethod
    def fit(self, problem: Problem) -> Tensor:
        """Learn the perturbation, (1, *S), inside `problem.threat.free`.

        `problem` holds all examples, with the model's own predictions as reference; it keeps no best points.
        """

    @final
    def fitted(self, problem: Problem) -> Perturbation:
        """The learned perturbation; its reference is the model's prediction of the clean examples."""
        ref = torch.cat(
            [part.goal.predicted_ref(part.predict(part.x), part.ref) for part in problem.batches(problem.batch_size)]
        )
        return Perturbation(self.fit(problem.compared_with(ref)).detach(), repr(self))

    @final
    def run(self, problem: Problem) -> Tensor:
        """Learn the perturbation from these examples and add it to them."""
        return self.fitted(problem).run(problem)

    @final
    def learn(
        self,
        target: Target | nn.Module | Fn,
        x: Tensor,
        ref: Tensor,
        *,
        goal: Goal = Misclassify(),
        threat: Threat,
        seed: int = 0,
        ids: Tensor | None = None,
    ) -> Perturbation:
        """Learn a perturbation from some examples; the result is itself an attack, for these or other examples.

        For goals that compare with true labels, such as `Misclassify`, the model's predictions of the clean inputs replace
        `ref`: a wrong prediction must change too. The other arguments are those of `Attack.__call__`. Where budgets differ
        between the examples, the largest is used.

        Raises:
            ArgumentError: There is no example, the threat is not supported, or as for `Attack.__call__`.
            ShapeError: As for `Attack.__call__`.
        """
        if not len(x):
            raise ArgumentError("x holds no example; a universal perturbation is learned from at least one")
        perturbation, cost = self._fit_checked(target, x, ref, goal, threat, seed, ids)
        assert isinstance(perturbation, Perturbation)
        assert cost is not None
        forwards, backwards, flat = (int(count.sum()) for count in (cost.forwards, cost.backwards, cost.flat))
        return replace(perturbation, forwards=forwards, backwards=backwards, flat=flat)


def shuffled_batches(problem: Problem, size: int, *draw: str | int) -> Iterator[Problem]:
    """All examples in batches of at most `size`, in a random order; only one batch is copied at a time."""
    order = random_order(problem, "order", *draw)
    for first in range(0, len(problem), size):
        yield problem[order[first : first + size]]


def random_order(problem: Problem, *draw: str | int) -> Tensor:
    """A random permutation of the examples, (N,) int64, by 62 random bits per id, so that ties are very unlikely."""
    high, low = problem.noise(*draw).bits(2).unbind(1)
    order: Tensor = (high * 2**30 + (low >> 2)).argsort(stable=True)
    return order


def success_rate(problem: Problem, delta: Tensor) -> float:
    """The share of the examples that reach the goal with the perturbation `delta` (1, *S), projected onto the threat set."""
    parts = problem.batches(problem.batch_size)
    successes = sum(int(part.success(part.threat.project(part.x + delta, part.x)).sum()) for part in parts)
    return successes / len(problem)
