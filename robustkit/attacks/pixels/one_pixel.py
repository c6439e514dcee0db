"""The one-pixel attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative
from robustkit._engine.noise import Noise
from robustkit.attacks.pixels._differential_evolution import MIN_POPULATION, Population, Strategy, latin_hypercube
from robustkit.attacks.pixels._locations import query_losses
from robustkit.attacks.pixels._pixel_attack import PixelAttack, PixelEncoding, normal_colours
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["OnePixel"]

_MAX_CANDIDATES = 512  # that are kept in memory, per image of the largest batch
_STRATEGIES = {"scipy": Strategy("best", (0.5, 1.0)), "paper": Strategy("rand", (0.5, 0.5))}


@final
@dataclass(frozen=True)
class OnePixel(PixelAttack):
    """Differential evolution over the locations and colours of one or a few pixels.

    There are two recipes. "scipy" is that of scipy, which public implementations copy: best/1, a scale drawn from [0.5, 1)
    in each generation, and an initial Latin hypercube. "paper" is that of Su et al.: rand/1 with a scale of 0.5, initial
    locations uniform and initial colours from N(128, 127) (of 255); the complete attack of the paper is
    `OnePixel(recipe="paper", generations=100, tolerance=0)`. In both, a child takes all its coordinates from the mutant and
    replaces its own parent if its loss is no higher.

    A coordinate that a mutation moves out of its range is redrawn uniformly, in both recipes (as in scipy; the paper does
    not say), and initial colours come from the normal distribution truncated to the range. Nothing is clamped, so no
    candidate has an extreme colour by accident.

    Unlike in public implementations, every queried candidate may be the success, not only the best of a generation, and an
    image leaves the batch at its first success, also in the middle of a generation.

    Attributes:
        pixels: Largest number of pixels to change; None for as many as the threat allows. An image with a smaller budget of
            its own keeps to that.
        population: Number of candidates per image, at least 4 (scipy's popsize is per dimension).
        generations: Largest number of generations: an image costs at most population * (generations + 1) forward passes.
        recipe: "scipy" or "paper".
        tolerance: An image leaves the batch when no coordinate of its candidates has a standard deviation above this share
            of the range: from then on all candidates are alike. scipy has such a rule too (on the losses, where a plateau
            would look converged); public one-pixel attacks turn it off, as 0 does here.

    Source: Su, Vargas & Sakurai 2019, "One pixel attack for fooling deep neural networks", section III
    (https://arxiv.org/abs/1710.08864): 400 candidates, at most 100 generations.
    """

    population: int = 400
    generations: int = 75
    recipe: Literal["scipy", "paper"] = "scipy"
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, generations=self.generations)
        at_least(MIN_POPULATION, population=self.population)
        not_negative(tolerance=self.tolerance)
        if self.recipe not in _STRATEGIES:
            raise ArgumentError(f"recipe={self.recipe!r} must be one of {', '.join(_STRATEGIES)}")

    def search(self, problem: Problem, count: int) -> Tensor:
        """One evolution per image, for as many images at once as memory allows."""
        at_once = max(1, min(problem.batch_size, _MAX_CANDIDATES * problem.batch_size // self.population))
        return torch.cat([self._evolve(part, count) for part in problem.batches(at_once)])

    def _evolve(self, problem: Problem, count: int) -> Tensor:
        """The best image of each population in the end, `count` pixels changed; solved and converged images leave earlier."""
        encoding = PixelEncoding(problem.x, problem.threat, count)
        x_adv, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        problem = problem[rows]
        points = self._initial_points(problem.noise("beginning"), encoding)
        population = Population.evaluated(points, _losses(problem, encoding, points))
        for generation in problem.steps(self.generations):
            active = problem.unsolved & ~population.converged(self.tolerance)
            if not active.all():
                x_adv[rows] = encoding.paint(problem.x, population.best)
                rows, problem, population = rows[active], problem[active], population[active]
            if not len(rows):
                break
            mutants = population.mutants(_STRATEGIES[self.recipe], problem.noise("generation", generation))
            population = population.select(mutants, _losses(problem, encoding, mutants))
        x_adv[rows] = encoding.paint(problem.x, population.best)
        return x_adv

    def _initial_points(self, noise: Noise, encoding: PixelEncoding) -> Tensor:
        """The first candidates, (M, P, D) in the unit cube."""
        if self.recipe == "scipy":
            return latin_hypercube(noise, self.population, encoding.dimensions)
        uniforms = noise.uniform(self.population, encoding.dimensions)
        return torch.where(encoding.is_colour, normal_colours(uniforms), uniforms)


def _losses(problem: Problem, encoding: PixelEncoding, points: Tensor) -> Tensor:
    """The loss at each of the points (M, P, D) of each example, (M, P) float64; infinite for points after a success."""

    def images(rows: Tensor, chunk: slice) -> Tensor:
        repeated = rows.repeat_interleave(chunk.stop - chunk.start)
        return encoding.paint(problem.x[repeated], points[rows, chunk].flatten(0, 1))

    return query_losses(problem, points.shape[1], images)
