"""What is done where an alarm goes off: the mechanism that it points to, on every example that is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import softplus

from robustkit._engine.tensors import nan_to_inf
from robustkit.attacks._cosine import cosine
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.attacks.standard.cascade import descend
from robustkit.attacks.standard.patch_search import search
from robustkit.attacks.standard.substitute import SubstituteConfig, train_substitute, transfer_attack
from robustkit.flags import flags_and_notes
from robustkit.goals import Goal, Out
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L2, Linf

__all__ = ["escalate", "reasons_to_escalate"]

_STEPS = 50  # of each further descent
_DRAWS, _MANY, _FADING, _REACH = 2, 125, 0.95, 2.0  # of a random model: draws a step, steps, what stays of the mean, first step
_VOTES, _CLEAR, _AGAIN = 16, 0.75, 6  # draws by which its points are compared; descents more where no point is as clear as that
_TURNS = ((1500, 500), (5000, 5000))  # queries of scores and of decisions for each example; the second where the first helps
_WINDOWS, _SHARE = 5000, 0.05  # queries of the search from the nearest point, and the share of a window
_COPY = SubstituteConfig(points=64, steps=400, rounds=4, strikes=3, min_examples=100, deep=True, walk=True)
_WORTH = 0.1  # of what was left a turn must break, for another one
_JOINT, _WHOLE = 5, 100  # descents of a whole batch, and their steps


def reasons_to_escalate(problem: Problem) -> list[str]:
    """Why a further search is called for, by name; empty where nothing calls for it."""
    reasons = [flag.name for flag in flags_and_notes(problem.checks)[0]]
    flat, asked = problem.flat[problem.unsolved].sum(), (problem.cost[problem.unsolved]).sum()
    if 6 * flat > asked:  # about half of the gradient queries
        reasons.append("flat-gradients")
    if problem.stochastic:
        reasons.append("stochastic-target")
    return reasons


def escalate(problem: Problem) -> Tensor | None:
    """Points that a further search ends at, (N, *S), or None where there was no reason for one; a note tells what was done."""
    reasons, left = reasons_to_escalate(problem), int(problem.unsolved.sum())
    if not reasons or not (left or "batch-dependent" in reasons):
        return None
    x_adv = None
    with problem.stage("escalation"):
        if problem.stochastic:
            x_adv, done = _select_by_vote(problem)
        elif "batch-dependent" in reasons:
            done = _joint_batch_attack(problem)
        else:
            done = _further(problem)
    why = f"{', '.join(reasons)}: tried {', '.join(done)}"
    problem.add_note(
        "escalated", why if problem.stochastic else f"{why}; {left} examples were left, now {int(problem.unsolved.sum())}"
    )
    return x_adv


def _further(problem: Problem) -> list[str]:
    """Other views, a copy, a search from where it is fooled, and searches that start from nothing."""
    done = []
    for number, view in enumerate(problem.views[1:]):
        through = problem.seen(view)
        goal = problem.goal.with_surrogate(margin)
        problem.success(descend(through.with_surrogate(goal, problem.ref), problem.start(2001 + number), _STEPS))
        done.append(f"view {view}")
    for turn, (scores, decisions) in enumerate(_TURNS):
        left = int(problem.unsolved.sum())
        found = _without_gradients(problem, turn, scores, decisions)
        done += found if turn == 0 else [f"all that once more with {scores} scores and {decisions} decisions of each"]
        if not 0 < int(problem.unsolved.sum()) <= (1 - _WORTH) * left:
            break
    return done


def _without_gradients(problem: Problem, turn: int, scores: int, decisions: int) -> list[str]:
    done, copy = [], train_substitute(problem, _COPY, turn)
    if copy is not None:
        done.append(f"transfer from a copy taught at {_COPY.points} points of each example")
        points = [problem.x, *transfer_attack(problem, copy, _COPY, turn)]
        if isinstance(problem.threat, Linf | L2):
            _search(problem, points, turn)
            done.append(f"{_WINDOWS} windows from the nearest of its points")
    for attack in (Square(queries=scores), RayS(queries=decisions)):
        if attack.supports(problem.threat) and problem.unsolved.any():
            problem.success(attack.run(problem))
            done.append(repr(attack))
    return done


def _search(problem: Problem, points: list[Tensor], turn: int) -> None:
    """Change windows at random from the point of each example that is nearest to the goal."""
    left = problem.unsolved.nonzero().squeeze(1)
    if not len(left):
        return
    edges = torch.stack([_edge(problem[left], x_adv[left]) for x_adv in points])
    nearest = torch.stack([point[left] for point in points])[edges.argmin(0), torch.arange(len(left))]
    search(problem, left, (nearest, edges.amin(0)), _WINDOWS, _SHARE, "windows", "escalation", turn)


def _edge(problem: Problem, x_adv: Tensor) -> Tensor:
    return nan_to_inf(problem.goal.boundary_margin(problem.predict(x_adv), problem.ref))


def _select_by_vote(problem: Problem) -> tuple[Tensor, list[str]]:
    """Of what averaged gradients and a copy find of a random model, the point of each example that succeeds most often.

    Candidates compete on draws of their own, and the winner is scored by others when the run is judged.
    """
    best, most = problem.x, torch.full((len(problem),), -1.0, device=problem.x.device)

    def compete(rows: Tensor, x_adv: Tensor) -> None:
        rate = torch.stack([problem[rows].success(x_adv) for _ in range(_VOTES)]).float().mean(0)
        better = rate > most[rows]
        best[rows[better]], most[rows[better]] = x_adv[better], rate[better]

    best = best.clone()
    everyone = torch.arange(len(problem), device=best.device)
    for x_adv in _candidates(problem):
        compete(everyone, x_adv)
    for number in range(_AGAIN):
        rows = (most < _CLEAR).nonzero().squeeze(1)
        if len(rows):
            some = problem[rows].with_eot_draws(2 * _DRAWS)
            start, reach = (some.start(2200 + number), _REACH) if number % 2 else (best[rows], 0.5)
            compete(rows, _averaged(some.with_surrogate(SoftHinge(some.goal), some.ref), start, reach))
    done = f"gradients averaged over {_DRAWS} draws a step and over the steps"
    return best, [done, f"transfer from a copy taught at {_COPY.points} points", f"the best by {_VOTES} draws"]


def _candidates(problem: Problem) -> Iterator[Tensor]:
    drawn = problem.with_eot_draws(_DRAWS)
    for number, view in enumerate(problem.views):
        for draw, goal in enumerate((problem.goal.with_surrogate(margin), SoftHinge(problem.goal))):
            start = problem.start(2000 + 10 * number + draw)
            yield _averaged(drawn.seen(view).with_surrogate(goal, problem.ref), start, _REACH)
    copy = train_substitute(problem, _COPY)
    if copy is not None:
        yield from transfer_attack(problem, copy, _COPY)


def _averaged(problem: Problem, x_adv: Tensor, reach: float) -> Tensor:
    """The end of a descent along gradients that are averaged over the draws of a step and, fading, over the steps, (N, *S).

    Many short steps with two draws each do more than a few with all of the draws: each is taken where the search stands.
    """
    mean = torch.zeros_like(x_adv)
    for step in range(_MANY):
        grad = problem.loss_and_grad(x_adv)[1]
        mean = _FADING * mean + grad
        fraction = reach * cosine(step, _MANY)
        x_adv = problem.threat.project(problem.threat.step(-mean, x_adv, problem.x, fraction), problem.x)
    return x_adv


@final
@dataclass(frozen=True, repr=False)
class SoftHinge(Goal):
    """Another goal whose margin counts the less the further it is beyond the border: no example is bought with others.

    Attributes:
        inner: The goal.
    """

    inner: Goal

    def loss(self, out: Out, ref: Tensor) -> Tensor:
        """log(1 + exp(margin + 1/2)), a hinge with a round corner, (N,)."""
        return softplus(self.inner.with_surrogate(margin).loss(out, ref) + 0.5)

    def success(self, out: Out, ref: Tensor) -> Tensor:
        """That of the other goal."""
        return self.inner.success(out, ref)


def _joint_batch_attack(problem: Problem) -> list[str]:
    """Descents of the whole batch, from which nobody leaves, each judged in the company in which it is to stand.

    The gradient of the sum of the losses holds what each example does to the others.
    """
    rows = (~problem.initially_successful).nonzero().squeeze(1)  # those that are judged at the end
    best, most = problem[rows].best, -1
    for number in range(_JOINT):
        batch = problem.subproblem(rows, keep="best")
        start, reach = (batch.start(2100 + number), 1.0) if number % 2 else (best, 0.5)
        x_adv = _joint_descent(batch.with_surrogate(SoftHinge(batch.goal), batch.ref), start, reach) if number else best
        found = int(batch.success(x_adv).sum())
        problem.charge(rows, batch)
        if found > most:
            best, most = x_adv, found
    problem[rows].submit_batch(best)
    return [f"{_JOINT - 1} descents of the whole batch together, judged in one company"]


def _joint_descent(problem: Problem, x_adv: Tensor, reach: float) -> Tensor:
    """Of the iterates of one descent the batch whose losses have the lowest sum: rows of different steps never met."""
    best, lowest = x_adv, torch.inf
    for step in range(_WHOLE):
        loss, grad = problem.loss_and_grad(x_adv)
        if float(loss.nan_to_num().sum()) < lowest:
            best, lowest = x_adv, float(loss.nan_to_num().sum())
        fraction = reach * cosine(step, _WHOLE)
        x_adv = problem.threat.project(problem.threat.step(-grad, x_adv, problem.x, fraction), problem.x)
    return best
