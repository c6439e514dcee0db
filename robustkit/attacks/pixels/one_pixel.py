"""The one-pixel attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, not_negative
from robustkit._engine.noise import Noise
from robustkit.attacks.pixels._differential_evolution import LEAST, Population, Strategy, latin_hypercube
from robustkit.attacks.pixels._pixel_attack import Canvas, PixelAttack, bell
from robustkit.errors import ArgumentError
from robustkit.problem import Problem

__all__ = ["OnePixel"]

_ROOM = 512  # candidates that are kept for each image that may go through the model at once
_STRATEGIES = {"scipy": Strategy("best", (0.5, 1.0)), "paper": Strategy("rand", (0.5, 0.5))}


@final
@dataclass(frozen=True)
class OnePixel(PixelAttack):
    """Differential evolution over the places and colours of one or a few pixels.

    Two recipes. "scipy" is scipy's, of which public implementations hold copies: best/1, a scale drawn from [0.5, 1) in each
    generation, a Latin hypercube to begin with. "paper" is that of Su et al.: rand/1 with a scale of 0.5, places drawn
    uniformly and colours from N(128, 127) (of 255) to begin with; theirs in full is
    `OnePixel(recipe="paper", generations=100, tolerance=0)`. In both a child takes all its coordinates from the mutant, and
    takes the place of its own parent where its loss is no higher.

    Values out of range: a coordinate that a mutation takes out of its range is drawn anew, uniformly, in both recipes (so does
    scipy; the paper does not say), and the first colours come from the part of their normal law that lies in range. Nothing
    is cut off, so no candidate has an extreme colour by accident.

    Unlike in public implementations every candidate that is looked at may be the success, not only the best one of a
    generation, and an image leaves at its first one, in the middle of a generation too.

    Attributes:
        pixels: How many pixels are changed at most; None for as many as the threat allows. An image whose own budget is
            smaller keeps to that.
        population: How many candidates there are for each image, at least 4 (scipy's popsize counts them for each dimension).
        generations: How often they are renewed at most: an image costs at most population * (generations + 1) forwards.
        recipe: "scipy" or "paper".
        tolerance: An evolution has come to rest, and its image leaves, when in no coordinate the standard deviation of its
            candidates exceeds this share of the range: from there on they all look alike. scipy has such a rule too (on the
            losses, where a flat landscape would look like rest); public one-pixel attacks turn it off, as 0 does here.

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
        at_least(LEAST, population=self.population)
        not_negative(tolerance=self.tolerance)
        if self.recipe not in _STRATEGIES:
            raise ArgumentError(f"recipe={self.recipe!r} must be one of {', '.join(_STRATEGIES)}")

    def search(self, problem: Problem, count: int) -> Tensor:
        """An evolution for each image, side by side; as many at once as there is room for."""
        at_once = max(1, min(problem.batch_size, _ROOM * problem.batch_size // self.population))
        return torch.cat([self._evolved(part, count) for part in problem.batches(at_once)])

    def _evolved(self, problem: Problem, count: int) -> Tensor:
        """The best image of each evolution in the end, `count` pixels changed; who is solved or at rest leaves before."""
        canvas = Canvas(problem.x, problem.threat, count)
        x_adv, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        left = problem[rows]
        points = self._beginning(left.noise("beginning"), canvas)
        population = Population.begun(points, _values(left, canvas, points))
        for generation in left.steps(self.generations):
            moving = left.unsolved & ~population.at_rest(self.tolerance)
            if not moving.all():
                x_adv[rows] = canvas.paint(left.x, population.best)
                rows, left, population = rows[moving], left[moving], population[moving]
            if not len(rows):
                break
            children = population.children(_STRATEGIES[self.recipe], left.noise("generation", generation))
            population = population.after(children, _values(left, canvas, children))
        x_adv[rows] = canvas.paint(left.x, population.best)
        return x_adv

    def _beginning(self, noise: Noise, canvas: Canvas) -> Tensor:
        """The first candidates, (M, P, D) in the unit cube."""
        if self.recipe == "scipy":
            return latin_hypercube(noise, self.population, canvas.dimensions)
        uniform = noise.uniform(self.population, canvas.dimensions)
        return torch.where(canvas.colours, bell(uniform), uniform)


def _values(problem: Problem, canvas: Canvas, points: Tensor) -> Tensor:
    """The loss at each of the points (M, P, D) of each example, (M, P); infinite after a success, where nobody looks.

    The first candidates of all examples are asked about, then the next ones: who falls early costs little, and as many
    images as may go through the model together always do.
    """
    values = torch.full(points.shape[:2], torch.inf, dtype=problem.x.dtype, device=points.device)
    asked, of, done = problem, torch.Size(), 0
    while done < points.shape[1]:
        rows = problem.unsolved.nonzero().squeeze(1)
        if not len(rows):
            break
        ahead = slice(done, done + max(1, problem.batch_size // len(rows)))
        candidates = points[rows, ahead]
        if of != candidates.shape[:2]:  # open examples only become fewer: as many as before are the same ones
            asked, of = problem[rows.repeat_interleave(candidates.shape[1])], candidates.shape[:2]
        loss = asked.loss(canvas.paint(asked.x, candidates.flatten(0, 1)))
        values[rows, ahead] = loss.reshape(of)
        done = ahead.stop
    return values
