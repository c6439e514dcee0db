"""Random search over windows of an image, at the edge of the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least, positive
from robustkit._engine.tensors import expand_rows, nan_to_inf
from robustkit.attack import Attack
from robustkit.attacks._square_patches import numbers, propose, start
from robustkit.errors import ArgumentError
from robustkit.problem import Problem
from robustkit.threats import L2, Linf, Threat

__all__ = ["Square"]

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@final
@dataclass(frozen=True)
class Square(Attack):
    """A square window of the image in other colours, at a random place; the change stays if it helps. Needs no gradient.

    Taken from the paper: the search (algorithm 1) with one candidate a query; for Linf the start from vertical stripes and
    windows in one colour, each channel at one end of the ball (algorithm 2); for L2 the start from tiles and the move of
    what one window has to another (algorithm 3), which always spends the whole budget; the share of the image that a window
    covers, halved nine times, rescaled to the number of queries. From the authors' code: the halves of an L2 window have the
    same length, its side is odd, and an Linf window that would change nothing takes other colours (here: the opposite ones).

    Here it is otherwise: the loss is that of the goal (there: the margin, or the cross-entropy of a wanted class, so
    `Misclassify(margin)` is the paper's choice); each image draws its own window; the first windows are larger (p = 0.8 as in
    AutoAttack; there 0.05 for Linf and 0.1 for L2); where an image is not as high as its window, that becomes as much wider,
    so that data of any shape are served: the last two axes are height and width, and a row of a table (N, D) is an image of
    height one; where the two parts of an L2 window cancel, the new one stands alone; there is one run, without restarts.

    Attributes:
        queries: The forwards of an image that is never solved, judging by the caller not included.
        p: The share of the image that a window covers at the beginning, in (0, 1].

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
            raise ArgumentError(f"p={self.p!r} must be at most 1: it is the share of the image that a window covers")

    def share(self, query: int) -> float:
        """The share of the image that the window of this query covers (from 1 on; the start is number 0)."""
        at = int(query / self.queries * 10_000)
        return self.p * 0.5 ** sum(at > begin for begin in _HALVINGS)

    def run(self, problem: Problem) -> Tensor:
        """Algorithm 1 for all images at once; the solved ones leave."""
        last, rows = problem.x.clone(), problem.unsolved.nonzero().squeeze(1)
        left = problem[rows]
        x_adv = start(left.threat, left.x, left.noise("start"))
        value = nan_to_inf(left.loss(x_adv))
        for query in left.steps(self.queries - 1):
            still = left.unsolved
            rows, left, x_adv, value = rows[still], left[still], x_adv[still], value[still]
            candidate = propose(
                left.threat,
                x_adv,
                left.x,
                self.share(query + 1),
                left.noise("query", query + 1).uniform(numbers(left.threat, left.x)),
            )
            loss = nan_to_inf(left.loss(candidate))
            better = loss < value
            x_adv, value = torch.where(expand_rows(better, x_adv), candidate, x_adv), torch.where(better, loss, value)
        last[rows] = x_adv
        return last
