"""One change for all examples, by steps on the averaged gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import as_rows
from robustkit.attacks.universal._universal import UniversalAttack, rate, shuffled
from robustkit.problem import Problem

__all__ = ["UniversalPGD"]


@final
@dataclass(frozen=True)
class UniversalPGD(UniversalAttack):
    """Minibatch by minibatch, a step against the mean gradient of the clamped loss, and a projection on the ball.

    Where a run ends depends more on where it began than on how long it is. So several random changes are carried through
    a fifth of the epochs, and the one that is best on the examples then goes on alone. (An embedding that is compared with
    itself has no gradient at zero: there is no start from there.) Steps shrink to zero. Unlike in the paper, what the box
    cuts off keeps its gradient: else a coordinate that went too far for most of the examples could not come back.

    Attributes:
        epochs: How many times all examples are seen.
        batch: How many examples a gradient is averaged over.
        reach: Length of the path of each epoch in budgets.
        clamp: Examples whose loss is that far below zero pull no more: the goal is reached well enough.
        starts: How many random changes compete.

    Source: Shafahi et al. 2020, "Universal adversarial training", the stochastic gradient method with the clamped loss
        (https://arxiv.org/abs/1811.11304); they clamp at 9.
    """

    epochs: int = 10
    batch: int = 32
    reach: float = 2.0
    clamp: float = 3.0
    starts: int = 4

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, batch=self.batch, starts=self.starts)
        positive(reach=self.reach, clamp=self.clamp)

    def fit(self, problem: Problem) -> Tensor:
        """A fifth of the way from every start, the whole way from the best."""
        ball, zero = problem.threat.free, torch.zeros_like(problem.x[:1])
        scouted = max(1, self.epochs // 5)
        found = []
        for start in range(self.starts):
            delta = ball.sample(zero, problem.common_noise("start", start))
            for epoch in range(scouted):
                delta = self._epoch(problem, delta, start, epoch)
            found.append(delta)
        best = max(range(self.starts), key=lambda start: rate(problem, found[start])) if self.starts > 1 else 0
        delta = found[best]
        for epoch in range(scouted, self.epochs):
            delta = self._epoch(problem, delta, best, epoch)
        return delta

    def _epoch(self, problem: Problem, delta: Tensor, start: int, epoch: int) -> Tensor:
        """Once through all examples, in an order of its own."""
        ball, zero = problem.threat.free, torch.zeros_like(delta)
        count = -(-len(problem) // self.batch)
        for number, some in enumerate(shuffled(problem, self.batch, start, epoch)):
            pull = torch.zeros_like(delta)
            for part in some.batches(some.batch_size):
                loss, grad = part.loss_and_grad(part.threat.project(part.x + delta, part.x))
                pull += (grad * as_rows((loss > -self.clamp).to(grad), grad)).sum(0, keepdim=True)
            left = 1 - (epoch + number / count) / self.epochs
            delta = ball.project(ball.step(-pull / len(some), delta, zero, 2 * left * self.reach / count), zero)
        return delta
