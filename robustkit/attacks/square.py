"""Square Attack: random search over square patches of an image, with scores only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import nan_to_inf
from robustkit.attack import Attack
from robustkit.attacks._descent import BestPoint
from robustkit.attacks._square_patches import initial_point, propose, uniforms_per_example
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["Square"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries: p is halved after each


@final
@dataclass(frozen=True)
class Square(Attack):
    """Perturbs a square patch at a random place, and keeps the change if it lowers the loss. Uses no gradient.

    As in the paper: random search (algorithm 1) with one candidate per query; for Linf, a start from vertical stripes and
    patches of one colour, each channel at one end of the ball (algorithm 2); for L2, a start from tiles and moves of the
    perturbation of one patch to another (algorithm 3), which always spend the whole budget; p, the share of the image that a
    patch covers, is halved nine times, on a schedule rescaled to the number of queries. As in the authors' code: both halves
    of an L2 patch have the same norm, its side is odd, and an Linf patch that would change nothing is redrawn (here: with
    the opposite colours).

    Unlike in the paper: the loss is that of the goal (there: the margin, or the cross-entropy of a target class, so
    `Misclassify(margin)` is the paper's choice); each image draws its own patch; the first patches are larger (p = 0.8 as in
    AutoAttack; there 0.05 for Linf and 0.1 for L2); a patch higher than the image becomes wider instead, so that data of any
    shape are supported: the last two axes are height and width, and a row of a table (N, D) is an image of height one; where
    the two terms of an L2 patch cancel, the new one alone is used; there is one run, without restarts.

    Attributes:
        queries: Forward passes of an image that is never solved, without the evaluation by the caller.
        p: The share of the image that a patch covers at first, in (0, 1].

    Source: Andriushchenko, Croce, Flammarion & Hein 2020, "Square Attack: a query-efficient black-box adversarial attack via
        random search" (https://arxiv.org/abs/1912.00049), there with 10,000 queries; 5,000 and p = 0.8 in AutoAttack, Croce &
        Hein 2020 (https://arxiv.org/abs/2003.01690).
    """

    access: ClassVar[Literal["white", "score", "label"]] = "score"
    serves: ClassVar[tuple[type[Threat], ...]] = (Linf, L2)

    queries: int = 5000
    p: float = 0.8

    def __post_init__(self) -> None:
        at_least(1, queries=self.queries)
        positive(p=self.p)
        if self.p > 1:
            raise ArgumentError(f"p={self.p!r} must be at most 1: it is the share of the image that a patch covers")

    def share(self, query: int) -> float:
        """The share of the image that the patch of a query covers; queries count from 1, the start is query 0."""
        rescaled = int(query / self.queries * 10_000)
        return self.p * 0.5 ** sum(rescaled > halving for halving in _HALVINGS)

    def run(self, problem: Problem) -> Tensor:
        """Algorithm 1 for all images at once; solved images leave the batch."""
        x_last, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        problem = problem[rows]
        x_adv = initial_point(problem.threat, problem.x, problem.noise("start"))
        best = BestPoint(x_adv, nan_to_inf(problem.loss(x_adv)))
        for query in problem.steps(self.queries - 1):
            unsolved = problem.unsolved
            rows, problem, best = rows[unsolved], problem[unsolved], best[unsolved]
            threat, x = problem.threat, problem.x
            uniforms = problem.noise("query", query + 1).uniform(uniforms_per_example(threat, x))
            candidate = propose(threat, best.x_adv, x, self.share(query + 1), uniforms)
            best.update(candidate, nan_to_inf(problem.loss(candidate)))
        x_last[rows] = best.x_adv
        return x_last
