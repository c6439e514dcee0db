"""A universal perturbation from the largest (p, q)-singular vector of a hidden layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.jacobian import Jacobian
from robustkit.attacks.universal._universal import UniversalAttack, random_order, success_rate
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import Threat

__all__ = ["UniversalSingular", "power_method"]

_MAX_LAYERS = 8  # tried where no layer is named


@final
@dataclass(frozen=True)
class UniversalSingular(UniversalAttack):
    """The perturbation that changes the linearised output of a hidden layer most: a (p, q)-singular vector of its Jacobian.

    It needs neither labels nor a loss. Only the sign of the vector, and the layer where none is named, are chosen by the
    success rate on all the examples.

    Attributes:
        layer: Name of the layer, as in `named_modules()`; None tries up to eight, spread over the depth of the model.
        q: The norm of the change of the layer's output, finite and at least 1; p is the norm of the threat.
        images: Number of examples, in random order, at which the Jacobian is taken.
        iterations: Largest number of steps of the power method, which also ends at a gain below a thousandth.

    Source: Khrulkov & Oseledets 2018, "Art of singular vectors and universal adversarial perturbations", the generalized
        power method for (p, q)-singular vectors (https://arxiv.org/abs/1709.03582): 64 images and q = 10, q = 5 in their
        code; there the layer is chosen by hand.
    """

    layer: str | None = None
    q: float = 10.0
    images: int = 64
    iterations: int = 50

    def __post_init__(self) -> None:
        at_least(1, images=self.images, iterations=self.iterations)
        positive(q=self.q)
        if self.q < 1:
            raise ArgumentError(f"q={self.q!r} must be at least 1; below it the power method need not increase its objective")

    def fit(self, problem: Problem) -> Tensor:
        """The perturbation of the best layer and sign."""
        sample = problem[random_order(problem, "images")[: self.images]]
        candidates = []
        for layer in self._layers(sample):
            jacobians = [part.jacobian(layer) for part in sample.batches(sample.batch_size)]
            start = problem.common_noise("start").normal(*sample.x.shape[1:]).to(sample.x)
            delta = power_method(jacobians, problem.threat.free, start, self.q, self.iterations)[0]
            candidates += [delta, -delta]
        return max(candidates, key=lambda delta: success_rate(problem, delta))

    def _layers(self, problem: Problem) -> Sequence[str | None]:
        """The layers to try; None stands for the output of a function without layers."""
        if self.layer is not None:
            return [self.layer]
        names = problem.layers()
        if len(names) <= _MAX_LAYERS:
            return names or [None]
        return [names[round(i * (len(names) - 1) / (_MAX_LAYERS - 1))] for i in range(_MAX_LAYERS)]


def power_method(
    jacobians: Sequence[Jacobian], ball: Threat, start: Tensor, q: float, iterations: int
) -> tuple[Tensor, list[float]]:
    """Maximise sum_i ||J_i v||_q^q over the perturbations v of a ball, by the power method for two norms (Boyd 1974).

    Each step maximises the objective linearised at the last v; because the objective is convex, it never decreases.

    Args:
        jacobians: The Jacobian at all examples, or one per batch of them.
        ball: A threat without a box; its norm is p.
        start: Any direction, (1, *S).
        q: At least 1.
        iterations: Largest number of steps; it also ends at a gain below a thousandth.

    Returns:
        v, (1, *S), and the q-th root of the objective at the start and after each step.
    """
    zero, objectives = torch.zeros_like(start), list[float]()
    delta = ball.steepest(start, zero)
    while True:
        outputs = [jacobian.jvp(delta).double() for jacobian in jacobians]
        # Divided by the largest value, so that the q-th power neither overflows nor underflows.
        scale = max(float(output.abs().max()) for output in outputs)
        scaled = [output / (scale or 1.0) for output in outputs]
        objectives.append(scale * sum(float(output.abs().pow(q).sum()) for output in scaled) ** (1 / q))
        if scale == 0:  # one product, so that a layer without a gradient is counted as flat
            for jacobian, output in zip(jacobians, outputs, strict=True):
                jacobian.vjp(torch.ones_like(output).to(start))
            return delta, objectives
        if len(objectives) > iterations or (len(objectives) > 1 and objectives[-1] < 1.001 * objectives[-2]):
            return delta, objectives
        cotangents = [(output.sign() * output.abs().pow(q - 1)).to(start) for output in scaled]
        grads = [jacobian.vjp(cotangent).sum(0) for jacobian, cotangent in zip(jacobians, cotangents, strict=True)]
        delta = ball.steepest(torch.stack(grads).sum(0, keepdim=True), zero)
