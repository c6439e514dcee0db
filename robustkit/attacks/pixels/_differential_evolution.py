"""Differential evolution for M problems at once, each with its own population. It knows nothing about attacks or images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise

__all__ = ["MIN_POPULATION", "Population", "Strategy", "distinct_members", "latin_hypercube"]

MIN_POPULATION = 4  # a mutant is made from three members other than its parent


@final
@dataclass(frozen=True)
class Strategy:
    """How a mutant is made: base + scale * (difference of two members), without crossover.

    Attributes:
        base: The base member: a random one ("rand/1") or the best one ("best/1").
        scale: The range [scale[0], scale[1]) from which the scale is drawn for each problem and generation ("dither"); two
            equal numbers give a fixed scale.

    Source: Storn & Price 1997, "Differential evolution", J. Global Optimization 11:341, for both bases; the dither is
    that of scipy.optimize.differential_evolution. Without crossover these are its "rand1bin" and "best1bin" at
    recombination=1, updating="deferred".
    """

    base: Literal["rand", "best"]
    scale: tuple[float, float]


@final
@dataclass(frozen=True, eq=False)
class Population:
    """One generation of points in the unit cube [0, 1)^D, each with its value of the objective to minimise.

    Attributes:
        points: P >= 4 points for each of M problems, (M, P, D).
        values: Their values, (M, P); infinite where a value is NaN or unknown.
    """

    points: Tensor
    values: Tensor

    @classmethod
    def evaluated(cls, points: Tensor, values: Tensor) -> Population:
        """The population of these points and values; NaN counts as infinity, the worst value."""
        return cls(points, values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))

    def __getitem__(self, rows: Tensor) -> Population:
        """The populations of the problems `rows`."""
        return Population(self.points[rows], self.values[rows])

    @property
    def best(self) -> Tensor:
        """The point of lowest value in each population, the first of equal ones, (M, D)."""
        return self.points[torch.arange(len(self.points), device=self.points.device), self.values.argmin(1)]

    def converged(self, tolerance: float) -> Tensor:
        """Whether no coordinate of the points has a standard deviation above `tolerance`, (M,) bool.

        A population of equal values never counts as converged: on a plateau the points may drift together anywhere.
        """
        concentrated = self.points.double().std(1, correction=0).amax(1) <= tolerance
        return concentrated & (self.values.amin(1) < self.values.amax(1))

    def mutants(self, strategy: Strategy, noise: Noise) -> Tensor:
        """One mutant per member, (M, P, D), all made from this generation.

        A coordinate that leaves [0, 1) is redrawn uniformly, as in scipy; clamping would pile up points at the ends.
        """
        _, p, d = self.points.shape
        first, second, third = (_take(self.points, members) for members in distinct_members(noise.at("others"), p))
        base = third if strategy.base == "rand" else self.best.unsqueeze(1)
        low, high = strategy.scale
        scale = low if low == high else low + (high - low) * noise.at("dither").uniform(1, 1)
        mutants = base + scale * (first - second)
        outside = (mutants < 0) | (mutants >= 1)
        return torch.where(outside, noise.at("anew").uniform(p, d), mutants)

    def select(self, mutants: Tensor, values: Tensor) -> Population:
        """The next generation: each mutant, (M, P, D), replaces its own parent if its value, (M, P), is no higher."""
        challengers = Population.evaluated(mutants, values)
        replaces = challengers.values <= self.values
        points = torch.where(replaces.unsqueeze(2), mutants, self.points)
        return Population(points, torch.where(replaces, challengers.values, self.values))


def distinct_members(noise: Noise, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three random members for each of p, different from it and each other, all triples equally likely; (M, p) int64 each."""
    draws = noise.uniform(3, p)
    taken = [torch.arange(p, device=draws.device).expand(len(draws), p)]
    for i in range(3):
        # The rank of the member among those not taken; its index follows by counting in the taken ones below it, in order.
        member = (draws[:, i] * (p - 1 - i)).long().clamp(max=p - 2 - i)
        for smaller in torch.stack(taken).sort(0).values:
            member = member + (member >= smaller)
        taken.append(member)
    return taken[1], taken[2], taken[3]


def latin_hypercube(noise: Noise, p: int, d: int) -> Tensor:
    """P points of the unit cube, one in each of P equal slices of every coordinate, (M, P, D) in [0, 1).

    Source: McKay, Beckman & Conover 1979, Technometrics 21:239.
    """
    order = noise.at("order").uniform(p, d).argsort(dim=1, stable=True)
    return ((order + noise.at("place").uniform(p, d)) / p).clamp(max=1 - 2**-24)


def _take(points: Tensor, members: Tensor) -> Tensor:
    """The points of the given members, (M, P, D), (M, P) -> (M, P, D)."""
    return points.gather(1, members.unsqueeze(2).expand_as(points))
