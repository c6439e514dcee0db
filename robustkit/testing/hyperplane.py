"""Classifiers with a known answer: two half-spaces, where the best adversarial example has a closed form."""

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

_DUAL = {Linf: 1.0, L2: 2.0, L1: torch.inf}  # the norm of the weights that the budget is multiplied with


@final
class Halfspace(nn.Module):
    """Logits (-s/2, s/2) for s = <weight, x> + bias; every row is computed by itself, bit for bit."""

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
    """Some points on both sides of a hyperplane, and how far they are from it.

    Attributes:
        net: The classifier, (N, *S) -> (N, 2).
        x: Points in [0, 1], (N, *S).
        y: The classes that the net gives them, (N,) int64.
    """

    net: Halfspace
    x: Tensor
    y: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x, self.y, strict=True))

    def single(self) -> Hyperplane:
        """The same in float32, as in use."""
        return Hyperplane(deepcopy(self.net).float(), self.x.float(), self.y)

    @property
    def margin(self) -> Tensor:
        """How much the score of each point must change before its class does, (N,) float64."""
        weight, bias = self.net.weight.detach().double(), self.net.bias.item()
        score: Tensor = (self.x.double() * weight).flatten(1).sum(1) + bias
        return score.abs()

    def optimal_size(self, norm: type[Threat]) -> Tensor:
        """The smallest size of a change that reaches the hyperplane where nothing bounds the inputs, (N,) float64."""
        slope: Tensor = torch.linalg.vector_norm(self.net.weight.detach().double(), _DUAL[norm])
        return self.margin / slope

    def best_gain(self, threat: Threat) -> Tensor:
        """The largest change of the score that the threat allows each point, its box included, (N,) float64.

        Computed one example at a time without any code of the threats.
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
        return _spend(gain.ravel(), room.ravel(), eps)
    return _bisect(gain, room, eps)


def _spend(gain: np.ndarray, room: np.ndarray, eps: float) -> float:
    """The best coordinates first, each as far as it goes."""
    total = 0.0
    for i in np.argsort(-gain):
        used = min(room[i], eps)
        total, eps = total + gain[i] * used, eps - used
    return float(total)


def _bisect(gain: np.ndarray, room: np.ndarray, eps: float) -> float:
    """min(t * gain, room) for the t at which its length is eps."""
    weight, gain = gain, gain / max(gain.max(), np.finfo(float).tiny)
    low, high = 0.0, 1.0
    while np.linalg.norm(np.minimum(high * gain, room)) < eps and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(np.minimum(middle * gain, room)) < eps else (low, middle)
    return float((weight * np.minimum(low * gain, room)).sum())
