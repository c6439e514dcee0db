"""What the forms of APGD share: the losses that they follow, run after run, and the best point of each run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit._engine.tensors import expand_rows
from robustkit.attack import Attack
from robustkit.errors import ArgumentError
from robustkit.goals import Goal, Out
from robustkit.losses import cross_entropy, dlr, margin
from robustkit.problem import Problem

__all__ = ["Point", "RestartedAttack", "Walk", "per_example"]

_Followed = Literal["cross-entropy", "margin", "dlr", "targeted-dlr"]
_LOSSES = {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr, "targeted-dlr": dlr}


@dataclass(frozen=True)
class RestartedAttack(Attack):
    """One run after another, each from a random start and each along one loss; what is solved sits the others out.

    Attributes:
        steps: Number of steps of a run. Each is one pass through the model, forward and back, and the start is one more.
        loss: What is followed in the place of the goal's own loss: "cross-entropy", "margin", "dlr", or "targeted-dlr" for
            runs towards one part of the goal after another. A goal that has but one loss keeps to it, and a note says so.
            The last two cost a forward more: it tells the likeliest parts, and whether there are enough classes (a note says
            what was followed instead).
        restarts: Runs along each loss.
        targets: How many parts of the goal, the likeliest at the unchanged input, "targeted-dlr" tries.
    """

    steps: int = 100
    loss: _Followed = "cross-entropy"
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, restarts=self.restarts, targets=self.targets)
        if self.loss not in get_args(_Followed):
            raise ArgumentError(f"loss={self.loss!r} must be one of {', '.join(get_args(_Followed))}")

    @abstractmethod
    def descend(self, problem: Problem, number: int) -> Point:
        """The best point of the run of this number, which names its random start."""

    @final
    def run(self, problem: Problem) -> Tensor:
        """The points of lowest loss over all runs; the losses of several parts are compared as they are."""
        x_best = problem.x.clone()
        rows = problem.unsolved.nonzero().squeeze(1)
        if len(rows):
            x_best[rows] = self._best_of_runs(problem[rows])
        return x_best

    def _best_of_runs(self, problem: Problem) -> Tensor:
        routes = self._routes(problem)
        x_best, lowest = problem.x.clone(), problem.x.new_full((len(problem),), torch.inf)
        for number in problem.steps(len(routes) * self.restarts):
            rows = problem.unsolved.nonzero().squeeze(1)
            some = problem.with_surrogate(*routes[number // self.restarts])[rows]
            found = self.descend(some, number)
            lower = found.loss < lowest[rows]
            x_best[rows[lower]], lowest[rows[lower]] = found.x_adv[lower], found.loss[lower]
        return x_best

    def _routes(self, problem: Problem) -> list[tuple[Goal, Tensor]]:
        """The losses to follow one after another, as goals with their references (N, ...)."""
        goal = problem.goal.with_surrogate(_LOSSES[self.loss])
        if goal is problem.goal:
            problem.add_note("loss", f"{goal!r} has a loss of its own, which was followed, not {self.loss}")
        if self.loss in ("cross-entropy", "margin") or (self.loss == "dlr" and goal is problem.goal):
            return [(goal, problem.ref)]
        # Of all examples, though one would tell the number of classes: what one costs must not depend on its neighbours.
        out = problem.predict(problem.x)
        parts = goal.parts(out, problem.ref)
        one_class = self.loss == "targeted-dlr" or len(parts) == 1
        if goal is not problem.goal:
            _tell_form(problem, out, self.loss, one_class)
        return parts[: self.targets] if self.loss == "targeted-dlr" else [(goal, problem.ref)]


def _tell_form(problem: Problem, out: Out, loss: str, one_class: bool) -> None:
    """Note where the logits are too few for the loss of that name, and what `losses` has put in its place."""
    classes = out.shape[1] if isinstance(out, Tensor) and out.dim() == 2 else None
    if classes == 2:
        problem.add_note("loss", f"{loss} needs more than the model's 2 classes: the margin was followed")
    elif classes == 3 and one_class:
        problem.add_note("loss", f"{loss} towards one class needs more than the model's 3: its form for three was followed")


@final
@dataclass(frozen=True, eq=False)
class Point:
    """A point of each example, (N, *S), the loss there, (N,), and its gradient, (N, *S)."""

    x_adv: Tensor
    loss: Tensor
    grad: Tensor

    def replaced(self, rows: Tensor, by: Point) -> Point:
        """The same with the points of `by` for the examples `rows`, (N,) bool."""
        here = expand_rows(rows, self.x_adv)
        return Point(
            torch.where(here, by.x_adv, self.x_adv),
            torch.where(rows, by.loss, self.loss),
            torch.where(here, by.grad, self.grad),
        )


@final
class Walk:
    """Where the examples of a run stand, and the best they have seen by the loss that is followed.

    Attributes:
        here: The points where they stand.
        best: Those of lowest loss so far, of equal ones the first.
    """

    def __init__(self, problem: Problem, x_adv: Tensor) -> None:
        self._problem = problem
        self.here = self.best = self._seen(x_adv)

    def to(self, x_adv: Tensor) -> None:
        """Go to `x_adv`: one pass through the model."""
        self.here = self._seen(x_adv)
        self.best = self.best.replaced(self.here.loss < self.best.loss, self.here)

    def back(self, rows: Tensor) -> None:
        """The examples `rows`, (N,) bool, return to their best points."""
        self.here = self.here.replaced(rows, self.best)

    def _seen(self, x_adv: Tensor) -> Point:
        # Copied, since the question may close examples. Those closed before answer with zero, which is not their loss.
        asked = self._problem.unsolved.clone()
        loss, grad = self._problem.loss_and_grad(x_adv)
        return Point(x_adv, torch.where(asked & ~loss.isnan(), loss, torch.inf), grad)


def per_example(value: float | Tensor, x: Tensor) -> Tensor:
    """One number an example, (N,) float64, of one for all."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(len(x))
