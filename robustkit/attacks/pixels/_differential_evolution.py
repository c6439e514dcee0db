"""Differential evolution, batched: M problems with a population each, all at once. It knows nothing of attacks or images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise

__all__ = ["LEAST", "Population", "Strategy", "latin_hypercube"]

LEAST = 4  # members of a population: each child is made of three others besides its parent


@final
@dataclass(frozen=True)
class Strategy:
    """How a child is made: a base, and the difference of two further members times a scale; no crossover.

    Attributes:
        base: What the difference is added to: a member drawn at random ("rand/1"), or the best one ("best/1").
        scale: By what the difference is multiplied: a number drawn in [scale[0], scale[1]) for each problem and generation
            ("dither"); two equal numbers are a fixed scale.

    Source: Storn & Price 1997, "Differential evolution", J. Global Optimization 11:341, for both bases; the dither is
    that of scipy.optimize.differential_evolution. Without crossover these are its "rand1bin" and "best1bin" at
    recombination=1, updating="deferred".
    """

    base: Literal["rand", "best"]
    scale: tuple[float, float]


@final
@dataclass(frozen=True, eq=False)
class Population:
    """Points of the unit cube [0, 1)^D, each with the value that is to be made small. A generation is a value of its own.

    Attributes:
        points: (M, P, D), P >= 4 points for each of M problems.
        values: (M, P); infinite where a value is not known or not a number.
    """

    points: Tensor
    values: Tensor

    @classmethod
    def begun(cls, points: Tensor, values: Tensor) -> Population:
        """The first generation; values that are no numbers are the worst there are."""
        return cls(points, values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))

    def __getitem__(self, rows: Tensor) -> Population:
        """The populations of some of the problems."""
        return Population(self.points[rows], self.values[rows])

    @property
    def best(self) -> Tensor:
        """The point of lowest value of each population, the first of equal ones, (M, D)."""
        return self.points[torch.arange(len(self.points), device=self.points.device), self.values.argmin(1)]

    def at_rest(self, spread: float) -> Tensor:
        """Whether the points have run together: no coordinate has a standard deviation above `spread`, (M,) bool.

        Points of equal values are never at rest: on flat ground they may drift together, towards nothing.
        """
        together = self.points.double().std(1, correction=0).amax(1) <= spread
        return together & (self.values.amin(1) < self.values.amax(1))

    def children(self, strategy: Strategy, noise: Noise) -> Tensor:
        """A child for each member, (M, P, D); all are made of this generation, none of another child.

        A coordinate that leaves [0, 1) is drawn anew, uniformly, as scipy does: cutting it off would pile the population
        up at the edges.
        """
        _, p, d = self.points.shape
        first, second, third = (_gathered(self.points, members) for members in others(noise.at("others"), p))
        base = third if strategy.base == "rand" else self.best.unsqueeze(1)
        low, high = strategy.scale
        scale = low if low == high else low + (high - low) * noise.at("dither").uniform(1, 1)
        child = base + scale * (first - second)
        outside = (child < 0) | (child >= 1)
        return torch.where(outside, noise.at("anew").uniform(p, d), child)

    def after(self, children: Tensor, values: Tensor) -> Population:
        """The next generation: each child, (M, P, D), in the place of its own parent where its value, (M, P), is no worse."""
        fresh = Population.begun(children, values)
        better = fresh.values <= self.values
        points = torch.where(better.unsqueeze(2), children, self.points)
        return Population(points, torch.where(better, fresh.values, self.values))


def others(noise: Noise, p: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three members for each of p, different from it and from each other, (M, p) int64 each; every triple is as likely."""
    draws = noise.uniform(3, p)
    taken = [torch.arange(p, device=draws.device).expand(len(draws), p)]
    for i in range(3):
        # One of the members that are left, by its rank among them; those taken below it are then counted in, in order.
        member = (draws[:, i] * (p - 1 - i)).long().clamp(max=p - 2 - i)
        for place in torch.stack(taken).sort(0).values:
            member = member + (member >= place)
        taken.append(member)
    return taken[1], taken[2], taken[3]


def latin_hypercube(noise: Noise, p: int, d: int) -> Tensor:
    """P points of the unit cube, one in each of P equal slices of every coordinate, (M, P, D) in [0, 1).

    Source: McKay, Beckman & Conover 1979, Technometrics 21:239.
    """
    order = noise.at("order").uniform(p, d).argsort(dim=1, stable=True)
    return ((order + noise.at("place").uniform(p, d)) / p).clamp(max=1 - 2**-24)


def _gathered(points: Tensor, members: Tensor) -> Tensor:
    return points.gather(1, members.unsqueeze(2).expand_as(points))
