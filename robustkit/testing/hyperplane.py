"""Linear classifiers, for which the optimal adversarial example has a closed form."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["Halfspace", "Hyperplane"]

_DUAL = {Linf: 1.0, L2: 2.0, L1: torch.inf}  # p of the dual norm of each threat's norm


@final
class Halfspace(nn.Module):
    """Logits (-s/2, s/2) for s = <weight, x> + bias; a row's bits do not depend on the batch."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(weight.new_tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(N, *S) -> (N, 2)."""
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([-score / 2, score / 2], 1)


@final
@dataclass(frozen=True)
class Hyperplane:
    """Points on both sides of a hyperplane, with closed forms of the optimal attacks.

    Attributes:
        net: The classifier, (N, *S) -> (N, 2).
        x: Points in [0, 1], (N, *S).
        y: The predicted classes, (N,) int64.
    """

    net: Halfspace
    x: Tensor
    y: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x, self.y, strict=True))

    def single(self) -> Hyperplane:
        """Return a copy in float32."""
        return Hyperplane(deepcopy(self.net).float(), self.x.float(), self.y)

    @property
    def margin(self) -> Tensor:
        """The absolute score of each point: the change of score at which its class changes, (N,) float64."""
        weight, bias = self.net.weight.detach().double(), self.net.bias.item()
        score: Tensor = (self.x.double() * weight).flatten(1).sum(1) + bias
        return score.abs()

    def optimal_size(self, norm: type[Threat]) -> Tensor:
        """Return the smallest perturbation size that reaches the hyperplane without bounds, (N,) float64."""
        dual_norm: Tensor = torch.linalg.vector_norm(self.net.weight.detach().double(), _DUAL[norm])
        return self.margin / dual_norm

    def best_gain(self, threat: Threat) -> Tensor:
        """Return the largest change of the score inside the threat, box included, (N,) float64.

        It is computed per example, and uses no code of the threats.
        """
        weight = self.net.weight.detach().double().numpy()
        gains = [_best_gain(weight * (1 - 2 * int(y)), x.double().numpy(), threat[i : i + 1]) for i, (x, y) in enumerate(self)]
        return torch.tensor(gains, dtype=torch.float64)


def _best_gain(weight: np.ndarray, x: np.ndarray, threat: Threat) -> float:
    low, high = threat.bounds or (-np.inf, np.inf)
    room = np.where(weight > 0, high - x, x - low)
    gain, eps = np.abs(weight), float(threat.eps)
    if isinstance(threat, Linf):
        return float((gain * np.minimum(room, eps)).sum())
    if isinstance(threat, Pixels):
        return float(np.sort((gain * room).sum(0).ravel())[::-1][: int(eps)].sum())
    if isinstance(threat, L1):
        return _l1_gain(gain.ravel(), room.ravel(), eps)
    return _l2_gain(gain, room, eps)


def _l1_gain(gain: np.ndarray, room: np.ndarray, eps: float) -> float:
    """Return the largest gain in L1: move the coordinates in order of decreasing gain, each as far as the box allows."""
    total = 0.0
    for i in np.argsort(-gain):
        used = min(room[i], eps)
        total, eps = total + gain[i] * used, eps - used
    return float(total)


def _l2_gain(gain: np.ndarray, room: np.ndarray, eps: float) -> float:
    """Return the largest gain in L2: the perturbation min(t * gain, room) with the t at which its norm is eps (bisection)."""
    weight, gain = gain, gain / max(gain.max(), np.finfo(float).tiny)
    low, high = 0.0, 1.0
    while np.linalg.norm(np.minimum(high * gain, room)) < eps and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(np.minimum(middle * gain, room)) < eps else (low, middle)
    return float((weight * np.minimum(low * gain, room)).sum())
