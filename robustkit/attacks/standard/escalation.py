"""Stronger attacks on the unsolved examples where a flag says that the cascade may have missed successes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robustkit._engine.tensors import nan_to_inf
from robustkit.attacks._descent import BestPoint, cosine_decay, gradient_descent
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.attacks.standard.cascade import descend
from robustkit.attacks.standard.patch_search import search_patches
from robustkit.attacks.standard.substitute import SubstituteConfig, train_substitute, transfer_attack
from robustkit.flags import flags_and_notes
from robustkit.goals import Goal, Out
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf

__all__ = ["SoftHinge", "escalate", "reasons_to_escalate"]

_VIEW_STEPS = 50  # of the descent through each further view
# On a random model: draws per step, steps, decay of the mean gradient, first step size in budgets.
_EOT_DRAWS, _EOT_STEPS, _EOT_DECAY, _EOT_REACH = 2, 125, 0.95, 2.0
# Draws by which points are compared; further descents for examples whose best success rate is below the second number.
_VOTES, _CLEAR_RATE, _RETRIES = 16, 0.75, 6
# Score and decision queries per example of each attempt; the second is made only where the first helps.
_ATTEMPTS = ((1500, 500), (5000, 5000))
_MIN_BROKEN = 0.1  # the share of the unsolved examples that an attempt must break for another one
_PATCH_QUERIES, _PATCH_SHARE = 5000, 0.05
_SUBSTITUTE = SubstituteConfig(
    points=64, steps=400, rounds=4, attacks_per_round=3, min_examples=100, convolutional=True, query_every_step=True
)
_JOINT_ATTEMPTS, _JOINT_STEPS = 5, 100  # of whole batches; the first is the best points of the cascade as they are


def reasons_to_escalate(problem: Problem) -> list[str]:
    """The names of the flags and other conditions that call for an escalation; empty if there are none."""
    reasons = [flag.name for flag in flags_and_notes(problem.checks)[0]]
    flat, cost = problem.flat[problem.unsolved].sum(), (problem.cost[problem.unsolved]).sum()
    if 6 * flat > cost:  # about half of the gradient queries: each costs three forward passes
        reasons.append("flat-gradients")
    if problem.stochastic:
        reasons.append("stochastic-target")
    return reasons


def escalate(problem: Problem) -> Tensor | None:
    """Run the attacks that the flags call for, and add a note that lists them.

    Returns:
        The points of highest success rate on a random model, (N, *S); None otherwise, when successes are kept already.
    """
    reasons, unsolved = reasons_to_escalate(problem), int(problem.unsolved.sum())
    if not reasons or not (unsolved or "batch-dependent" in reasons):
        return None
    x_adv = None
    with problem.stage("escalation"):
        if problem.stochastic:
            x_adv, attacks = _select_by_vote(problem)
        elif "batch-dependent" in reasons:
            attacks = _joint_batch_attack(problem)
        else:
            attacks = _further_attacks(problem)
    why = f"{', '.join(reasons)}: ran {', '.join(attacks)}"
    if not problem.stochastic:
        why += f"; {unsolved} examples were unsolved before, {int(problem.unsolved.sum())} after"
    problem.add_note("escalated", why)
    return x_adv


def _further_attacks(problem: Problem) -> list[str]:
    """Attack through other views, by transfer and without gradients; returns descriptions of the attacks."""
    attacks = []
    for number, view in enumerate(problem.views[1:]):
        goal = problem.goal.with_surrogate_loss(margin)
        through_view = problem.with_view(view).with_surrogate_loss(goal, problem.ref)
        problem.success(descend(through_view, problem.start(2001 + number), _VIEW_STEPS))
        attacks.append(f"view {view}")
    for attempt, (scores, decisions) in enumerate(_ATTEMPTS):
        before = int(problem.unsolved.sum())
        done = _attack_without_gradients(problem, attempt, scores, decisions)
        attacks += (
            done if attempt == 0 else [f"the same again with {scores} score and {decisions} decision queries per example"]
        )
        if not 0 < int(problem.unsolved.sum()) <= (1 - _MIN_BROKEN) * before:
            break
    return attacks


def _attack_without_gradients(problem: Problem, attempt: int, scores: int, decisions: int) -> list[str]:
    """Attack by transfer, patches, Square and RayS; returns descriptions of the attacks."""
    attacks, substitute = [], train_substitute(problem, _SUBSTITUTE, attempt)
    if substitute is not None:
        attacks.append(f"transfer from a substitute model trained on {_SUBSTITUTE.points} points per example")
        points = [problem.x, *transfer_attack(problem, substitute, _SUBSTITUTE, attempt)]
        if isinstance(problem.threat, Linf | L2):
            _search_from_best(problem, points, attempt)
            attacks.append(f"{_PATCH_QUERIES} patches from the best of its points")
    for attack in (Square(queries=scores), RayS(queries=decisions)):
        if attack.supports(problem.threat) and problem.unsolved.any():
            problem.success(attack.run(problem))
            attacks.append(repr(attack))
    return attacks


def _search_from_best(problem: Problem, points: list[Tensor], attempt: int) -> None:
    """Search patches from the point of smallest boundary margin of each example among several, (N, *S) each."""
    rows = problem.unsolved.nonzero().squeeze(1)
    if not len(rows):
        return
    margins = torch.stack([_boundary_margin(problem[rows], x_adv[rows]) for x_adv in points])
    nearest = torch.stack([x_adv[rows] for x_adv in points])[margins.argmin(0), torch.arange(len(rows))]
    best = BestPoint(nearest, margins.amin(0))
    search_patches(problem, rows, best, _PATCH_QUERIES, _PATCH_SHARE, "windows", "escalation", attempt)


def _boundary_margin(problem: Problem, x_adv: Tensor) -> Tensor:
    """The boundary margin at `x_adv` on the deployed function, (N,); infinite where it is NaN."""
    return nan_to_inf(problem.goal.boundary_margin(problem.predict(x_adv), problem.ref))


def _select_by_vote(problem: Problem) -> tuple[Tensor, list[str]]:
    """The point of each example that succeeds most often on a random model, (N, *S), and descriptions of the attacks.

    Candidates are compared on draws of their own; the final evaluation of the selected point uses other draws.
    """
    # The loss is minus the success rate, so that any point is better than none.
    best = BestPoint(problem.x, torch.full((len(problem),), 1.0, device=problem.x.device))

    def compare(rows: Tensor, x_adv: Tensor) -> None:
        rate = torch.stack([problem[rows].success(x_adv) for _ in range(_VOTES)]).float().mean(0)
        best.update(x_adv, -rate, rows)

    all_rows = torch.arange(len(problem), device=problem.x.device)
    for x_adv in _random_model_candidates(problem):
        compare(all_rows, x_adv)
    for number in range(_RETRIES):
        rows = (best.loss > -_CLEAR_RATE).nonzero().squeeze(1)
        if len(rows):
            examples = problem[rows].with_eot_draws(2 * _EOT_DRAWS)
            start, reach = (examples.start(2200 + number), _EOT_REACH) if number % 2 else (best.x_adv[rows], 0.5)
            soft = examples.with_surrogate_loss(SoftHinge(examples.goal), examples.ref)
            compare(rows, _descend_on_mean_gradient(soft, start, reach))
    return best.x_adv, [
        f"gradients averaged over {_EOT_DRAWS} draws per step and over the steps",
        f"transfer from a substitute model trained on {_SUBSTITUTE.points} points per example",
        f"selection by {_VOTES} draws",
    ]


def _random_model_candidates(problem: Problem) -> Iterator[Tensor]:
    """Points from averaged gradients through each view, and from a substitute model, (N, *S) each."""
    averaged = problem.with_eot_draws(_EOT_DRAWS)
    for number, view in enumerate(problem.views):
        for draw, goal in enumerate((problem.goal.with_surrogate_loss(margin), SoftHinge(problem.goal))):
            start = problem.start(2000 + 10 * number + draw)
            yield _descend_on_mean_gradient(averaged.with_view(view).with_surrogate_loss(goal, problem.ref), start, _EOT_REACH)
    substitute = train_substitute(problem, _SUBSTITUTE)
    if substitute is not None:
        yield from transfer_attack(problem, substitute, _SUBSTITUTE)


def _descend_on_mean_gradient(problem: Problem, x_adv: Tensor, reach: float) -> Tensor:
    """The last point of a descent on an exponentially decaying mean of the gradients, (N, *S).

    Many steps with few draws each do better than few steps with many draws: each gradient is that of the current point.
    """
    mean = torch.zeros_like(x_adv)

    def update(step: int, x_adv: Tensor, grad: Tensor) -> Tensor:
        nonlocal mean
        mean = _EOT_DECAY * mean + grad
        fraction = reach * cosine_decay(step, _EOT_STEPS)
        return problem.threat.project(problem.threat.step(-mean, x_adv, problem.x, fraction), problem.x)

    return gradient_descent(problem, x_adv, range(_EOT_STEPS), update)


@final
@dataclass(frozen=True, repr=False)
class SoftHinge(Goal):
    """The goal `inner` with a loss that saturates beyond the decision boundary.

    In the sum of a batch, an example far beyond the boundary does not outweigh examples that are unsolved.

    Attributes:
        inner: The goal.
    """

    inner: Goal

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """The softplus of the margin plus 1/2, log(1 + exp(margin + 1/2)), (N,)."""
        return softplus(self.inner.with_surrogate_loss(margin).loss(out, ref) + 0.5)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """The success of `inner`, (N,) bool."""
        return self.inner.success(out, ref)


def _joint_batch_attack(problem: Problem) -> list[str]:
    """Attack the whole batch at once, and submit the batch with the most successes; returns descriptions of the attacks.

    The gradient of the sum of the losses contains the effect of each example on the others. Solved examples stay in the
    batch, since each example is evaluated in its final batch.
    """
    rows = (~problem.initially_successful).nonzero().squeeze(1)  # the examples of the final evaluation
    best, most = problem[rows].best, -1
    for number in range(_JOINT_ATTEMPTS):
        batch = problem.subproblem(rows, keep="best")
        start, reach = (batch.start(2100 + number), 1.0) if number % 2 else (best, 0.5)
        x_adv = _descend_on_sum(batch.with_surrogate_loss(SoftHinge(batch.goal), batch.ref), start, reach) if number else best
        successes = int(batch.success(x_adv).sum())
        problem.charge(rows, batch)
        if successes > most:
            best, most = x_adv, successes
    problem[rows].submit_batch(best)
    return [f"{_JOINT_ATTEMPTS - 1} descents on the whole batch, evaluated as one batch"]


def _descend_on_sum(problem: Problem, x_adv: Tensor, reach: float) -> Tensor:
    """The iterate with the lowest sum of losses, (N, *S): points of different iterates were never evaluated together."""
    best, lowest = x_adv, torch.inf

    def observe(x_adv: Tensor, loss: Tensor) -> None:
        nonlocal best, lowest
        total = float(loss.nan_to_num().sum())
        if total < lowest:
            best, lowest = x_adv, total

    def update(step: int, x_adv: Tensor, grad: Tensor) -> Tensor:
        fraction = reach * cosine_decay(step, _JOINT_STEPS)
        return problem.threat.project(problem.threat.step(-grad, x_adv, problem.x, fraction), problem.x)

    gradient_descent(problem, x_adv, range(_JOINT_STEPS), update, observe)
    return best
