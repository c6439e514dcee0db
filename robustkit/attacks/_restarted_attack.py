"""What the two forms of APGD share: restarts along surrogate losses, and the best point of each run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from robustkit._engine.field_checks import at_least
from robustkit._engine.tensors import expand_rows
from robustkit.attack import Attack
from robustkit.attacks._descent import BestPoint
from robustkit.errors import ArgumentError
from robustkit.goals import Goal, Out
from robustkit.losses import cross_entropy, dlr, margin
from robustkit.problem import Problem

__all__ = ["Point", "RestartedAttack", "Trajectory", "per_example"]

_LossName = Literal["cross-entropy", "margin", "dlr", "targeted-dlr"]
_LOSSES = {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr, "targeted-dlr": dlr}


@dataclass(frozen=True)
class RestartedAttack(Attack):
    """Several runs, each from a random start and along one loss; solved examples are skipped.

    Attributes:
        steps: Number of steps of a run. Each step, and the start, costs one forward and one backward pass.
        loss: The loss to minimise instead of the goal's own: "cross-entropy", "margin", "dlr", or "targeted-dlr" for runs
            towards one part of the goal after another. A goal that has only one loss keeps it, which is noted. The last two
            cost one more forward pass: it orders the parts and shows whether there are enough classes (if not, a note says
            which loss was used instead).
        restarts: Number of runs along each loss.
        targets: Number of parts of the goal, likeliest at the clean input first, that "targeted-dlr" tries.
    """

    steps: int = 100
    loss: _LossName = "cross-entropy"
    restarts: int = 1
    targets: int = 9

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, restarts=self.restarts, targets=self.targets)
        if self.loss not in get_args(_LossName):
            raise ArgumentError(f"loss={self.loss!r} must be one of {', '.join(get_args(_LossName))}")

    @abstractmethod
    def descend(self, problem: Problem, draw: int) -> Point:
        """Make one run from the random start number `draw` and return its best point."""

    @final
    def run(self, problem: Problem) -> Tensor:
        """The points of lowest loss over all runs, (N, *S); the losses of several parts are compared as they are."""
        x_best = problem.x.clone()
        rows = problem.unsolved.nonzero().squeeze(1)
        if len(rows):
            x_best[rows] = self._best_of_runs(problem[rows])
        return x_best

    def _best_of_runs(self, problem: Problem) -> Tensor:
        surrogates = self._surrogate_losses(problem)
        best = BestPoint(problem.x)
        for draw in problem.steps(len(surrogates) * self.restarts):
            rows = problem.unsolved.nonzero().squeeze(1)
            unsolved = problem.with_surrogate_loss(*surrogates[draw // self.restarts])[rows]
            end = self.descend(unsolved, draw)
            best.update(end.x_adv, end.loss, rows)
        return best.x_adv

    def _surrogate_losses(self, problem: Problem) -> list[tuple[Goal, Tensor]]:
        """The losses to minimise one after another, as goals with their references (N, ...)."""
        goal = problem.goal.with_surrogate_loss(_LOSSES[self.loss])
        if goal is problem.goal:
            problem.add_note("loss", f"{goal!r} has a loss of its own, which was used instead of {self.loss}")
        if self.loss in ("cross-entropy", "margin") or (self.loss == "dlr" and goal is problem.goal):
            return [(goal, problem.ref)]
        # All examples are queried, though one would show the number of classes: the cost of an example must not depend on
        # the rest of the batch.
        out = problem.predict(problem.x)
        parts = goal.parts(out, problem.ref)
        one_class = self.loss == "targeted-dlr" or len(parts) == 1
        if goal is not problem.goal:
            _note_replaced_dlr(problem, out, self.loss, one_class)
        return parts[: self.targets] if self.loss == "targeted-dlr" else [(goal, problem.ref)]


def _note_replaced_dlr(problem: Problem, out: Out, loss: str, one_class: bool) -> None:
    """Add a note where there are too few logits for the loss of that name, and say what `losses` computes instead."""
    classes = out.shape[1] if isinstance(out, Tensor) and out.dim() == 2 else None
    if classes == 2:
        problem.add_note("loss", f"{loss} needs more than the model's 2 classes: the margin was used")
    elif classes == 3 and one_class:
        problem.add_note("loss", f"{loss} towards one class needs more than the model's 3: its form for three was used")


@final
@dataclass(frozen=True, eq=False)
class Point:
    """One point per example, (N, *S), the loss there, (N,), and the gradient of the loss, (N, *S)."""

    x_adv: Tensor
    loss: Tensor
    grad: Tensor

    def replaced(self, mask: Tensor, other: Point) -> Point:
        """A copy with the points of `other` where `mask`, (N,) bool, is true."""
        row_mask = expand_rows(mask, self.x_adv)
        return Point(
            torch.where(row_mask, other.x_adv, self.x_adv),
            torch.where(mask, other.loss, self.loss),
            torch.where(row_mask, other.grad, self.grad),
        )


@final
class Trajectory:
    """The iterates of one run and the best of them by the loss that is minimised.

    Attributes:
        current: The current iterates.
        best: The iterates of lowest loss so far; of equal ones the first.
    """

    def __init__(self, problem: Problem, x_adv: Tensor) -> None:
        self._problem = problem
        self.current = self.best = self._evaluate(x_adv)

    def move_to(self, x_adv: Tensor) -> None:
        """Make `x_adv` (N, *S) the current iterates: one forward and one backward pass."""
        self.current = self._evaluate(x_adv)
        self.best = self.best.replaced(self.current.loss < self.best.loss, self.current)

    def return_to_best(self, mask: Tensor) -> None:
        """Return to the best iterate where `mask`, (N,) bool, is true."""
        self.current = self.current.replaced(mask, self.best)

    def _evaluate(self, x_adv: Tensor) -> Point:
        # Copied, because the query may solve examples. Those solved earlier return zero, which is not their loss.
        queried = self._problem.unsolved.clone()
        loss, grad = self._problem.loss_and_grad(x_adv)
        return Point(x_adv, torch.where(queried & ~loss.isnan(), loss, torch.inf), grad)


def per_example(value: float | Tensor, x: Tensor) -> Tensor:
    """One number per example, (N,) float64, from one number for all or one per example."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(len(x))
