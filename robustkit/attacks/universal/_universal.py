"""What all universal attacks share: one change is learned from many examples, then put on every one."""

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

__all__ = ["UniversalAttack", "random_order", "rate", "shuffled"]


class UniversalAttack(Attack):
    """Learns one change (1, *S) that brings the goal about on as many examples as it can.

    Called like any attack, it learns from the very examples that it is judged on, which flatters it; `learn` gives the
    finished change, to be judged on others.
    """

    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)
    universal: ClassVar[bool] = True

    @abstractmethod
    def fit(self, problem: Problem) -> Tensor:
        """The change, (1, *S), inside `problem.threat.free`.

        `problem` holds all examples with the model's own answers as reference; nothing is judged or kept on the way.
        """

    @final
    def fitted(self, problem: Problem) -> Perturbation:
        """The finished change: fitted against what the model itself says of the unchanged examples."""
        ref = torch.cat(
            [part.goal.predicted_ref(part.predict(part.x), part.ref) for part in problem.batches(problem.batch_size)]
        )
        return Perturbation(self.fit(problem.compared_with(ref)).detach(), repr(self))

    @final
    def run(self, problem: Problem) -> Tensor:
        """Learned from these examples, and put on them."""
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
        """A change learned from some examples, to be put on these or any others: it is an attack of its own.

        For goals that compare with a truth, such as `Misclassify`, the model's own clean answers take the place of
        `ref`: an answer that was wrong before has to change too. Other arguments as when an attack is called. Where
        budgets differ between the examples, the largest one counts.

        Raises:
            ArgumentError: No example, a threat that is not served, or as when an attack is called.
            ShapeError: As when an attack is called.
        """
        if not len(x):
            raise ArgumentError("x holds no example; a universal perturbation is learned from at least one")
        made, spent = self._prepared(target, x, ref, goal, threat, seed, ids)
        assert isinstance(made, Perturbation)
        assert spent is not None
        forwards, backwards, flat = (int(count.sum()) for count in (spent.forwards, spent.backwards, spent.flat))
        return replace(made, forwards=forwards, backwards=backwards, flat=flat)


def shuffled(problem: Problem, size: int, *draw: str | int) -> Iterator[Problem]:
    """All examples in groups of at most `size`, in a random order that belongs to the examples; no copy of them all."""
    order = random_order(problem, "order", *draw)
    for first in range(0, len(problem), size):
        yield problem[order[first : first + size]]


def random_order(problem: Problem, *draw: str | int) -> Tensor:
    """The examples in a random order that belongs to their ids, (N,) int64; 62 bits, so that hardly ever two are equal."""
    high, low = problem.noise(*draw).bits(2).unbind(1)
    order: Tensor = (high * 2**30 + (low >> 2)).argsort(stable=True)
    return order


def rate(problem: Problem, delta: Tensor) -> float:
    """The share of the examples on which the goal is reached with the change `delta` (1, *S), cut to the box."""
    parts = problem.batches(problem.batch_size)
    reached = sum(int(part.success(part.threat.project(part.x + delta, part.x)).sum()) for part in parts)
    return reached / len(problem)
