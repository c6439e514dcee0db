"""A universal perturbation by stochastic projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import as_rows
from robustkit.attacks.universal._universal import UniversalAttack, shuffled_batches, success_rate
from robustkit.problem import Problem

__all__ = ["UniversalPGD"]


@final
@dataclass(frozen=True)
class UniversalPGD(UniversalAttack):
    """For each minibatch, a step against the mean gradient of the clamped loss, projected onto the ball.

    The result depends more on the start than on the number of epochs. So several random starts are run for a fifth of the
    epochs, and only the one with the highest success rate continues. (Zero is no start for an embedding that is compared
    with itself, whose gradient vanishes there.) The step size decays linearly to zero. Unlike in the paper, coordinates that
    the box clamps keep their gradient: otherwise one that moved too far for most examples could not come back.

    Attributes:
        epochs: Number of passes over the examples.
        batch: Number of examples over which a gradient is averaged.
        reach: Mean length of the path of an epoch in budgets.
        clamp: An example whose loss is below minus this value has no gradient: its goal is reached well enough.
        starts: Number of random starts.

    Source: Shafahi et al. 2020, "Universal adversarial training", the stochastic gradient method with the clamped loss
        (https://arxiv.org/abs/1811.11304); there the loss is clamped at 9.
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
        """A fifth of the epochs from every start, the rest from the best."""
        ball, zero = problem.threat.free, torch.zeros_like(problem.x[:1])
        trial_epochs = max(1, self.epochs // 5)
        deltas = []
        for start in range(self.starts):
            delta = ball.sample(zero, problem.common_noise("start", start))
            for epoch in range(trial_epochs):
                delta = self._epoch(problem, delta, start, epoch)
            deltas.append(delta)
        best = max(range(self.starts), key=lambda start: success_rate(problem, deltas[start])) if self.starts > 1 else 0
        delta = deltas[best]
        for epoch in range(trial_epochs, self.epochs):
            delta = self._epoch(problem, delta, best, epoch)
        return delta

    def _epoch(self, problem: Problem, delta: Tensor, start: int, epoch: int) -> Tensor:
        """One pass over the examples, in a random order of its own."""
        ball, zero = problem.threat.free, torch.zeros_like(delta)
        batches = -(-len(problem) // self.batch)
        for number, batch in enumerate(shuffled_batches(problem, self.batch, start, epoch)):
            grad_sum = torch.zeros_like(delta)
            for part in batch.batches(batch.batch_size):
                loss, grad = part.loss_and_grad(part.threat.project(part.x + delta, part.x))
                grad_sum += (grad * as_rows((loss > -self.clamp).to(grad), grad)).sum(0, keepdim=True)
            remaining = 1 - (epoch + number / batches) / self.epochs
            delta = ball.project(ball.step(-grad_sum / len(batch), delta, zero, 2 * remaining * self.reach / batches), zero)
        return delta
