"""One change for all images, from the largest singular vector of a hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.jacobian import Jacobian
from robustkit.attacks.universal._universal import UniversalAttack, random_order, rate
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["UniversalSingular", "power_method"]

LAYERS = 8  # that are tried where none is named


@final
@dataclass(frozen=True)
class UniversalSingular(UniversalAttack):
    """The change that moves a hidden layer most, seen linearly: a (p, q)-singular vector of its Jacobian over some examples.

    It needs neither labels nor a loss: only which of the two signs, and which layer if none is named, is chosen by how often
    the goal is reached on all the examples.

    Attributes:
        layer: Its name, as in `named_modules()`; None tries up to eight that are spread over the depth of the model.
        q: In which norm the change of the layer is measured, finite and at least 1; p is that of the threat.
        images: How many examples the Jacobian is taken at: the first of a random order.
        iterations: The most steps of the power method, which ends where a step gains less than a thousandth.

    Source: Khrulkov & Oseledets 2018, "Art of singular vectors and universal adversarial perturbations", the generalized
        power method for (p, q)-singular vectors (https://arxiv.org/abs/1709.03582): 64 images and q = 10 there, 5 in their
        code; unlike there, layers are compared on the examples and not by hand.
    """

    layer: str | None = None
    q: float = 10.0
    images: int = 64
    iterations: int = 50

    def __post_init__(self) -> None:
        at_least(1, images=self.images, iterations=self.iterations)
        positive(q=self.q)
        if self.q < 1:
            raise ArgumentError(f"q={self.q!r} must be at least 1; below it nothing makes the power method climb")

    def fit(self, problem: Problem) -> Tensor:
        """The best sign of the best layer."""
        some = problem[random_order(problem, "images")[: self.images]]
        candidates = []
        for layer in self._layers(some):
            jacobians = [part.jacobian(layer) for part in some.batches(some.batch_size)]
            start = problem.common_noise("start").normal(*some.x.shape[1:]).to(some.x)
            delta = power_method(jacobians, problem.threat.free, start, self.q, self.iterations)[0]
            candidates += [delta, -delta]
        return max(candidates, key=lambda delta: rate(problem, delta))

    def _layers(self, problem: Problem) -> Sequence[str | None]:
        if self.layer is not None:
            return [self.layer]
        names = problem.layers()
        if len(names) <= LAYERS:
            return names or [None]
        return [names[round(i * (len(names) - 1) / (LAYERS - 1))] for i in range(LAYERS)]


def power_method(
    jacobians: Sequence[Jacobian], ball: Threat, start: Tensor, q: float, iterations: int
) -> tuple[Tensor, list[float]]:
    """Make sum_i ||J_i v||_q^q large over the changes v of a ball, by the power method for two norms (Boyd 1974).

    Each step takes the change that is best for the objective linearised at the last one; since it is convex it never falls.

    Args:
        jacobians: Of some examples together, or of batches of them.
        ball: A threat without a box; its norm is p.
        start: Any direction, (1, *S).
        q: At least 1.
        iterations: The most steps; it ends where one gains less than a thousandth.

    Returns:
        The change, (1, *S), and the q-th root of the objective at the start and after each step.
    """
    zero, reached = torch.zeros_like(start), list[float]()
    change = ball.steepest(start, zero)
    while True:
        moved = [jacobian.push(change).double() for jacobian in jacobians]
        # In units of the largest: its q-th power neither overflows nor vanishes.
        scale = max(float(part.abs().max()) for part in moved)
        units = [part / (scale or 1.0) for part in moved]
        reached.append(scale * sum(float(part.abs().pow(q).sum()) for part in units) ** (1 / q))
        if scale == 0:  # asked for once, so that a layer without any gradient is counted as what it is
            for jacobian, part in zip(jacobians, moved, strict=True):
                jacobian.pull(torch.ones_like(part).to(start))
            return change, reached
        if len(reached) > iterations or (len(reached) > 1 and reached[-1] < 1.001 * reached[-2]):
            return change, reached
        weights = [(part.sign() * part.abs().pow(q - 1)).to(start) for part in units]
        pulled = [jacobian.pull(weight).sum(0) for jacobian, weight in zip(jacobians, weights, strict=True)]
        change = ball.steepest(torch.stack(pulled).sum(0, keepdim=True), zero)
