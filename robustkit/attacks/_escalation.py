"""What is done where an alarm goes off: the mechanism that it points to, on every example that is left."""

from __future__ import annotations

from torch import Tensor

from robustkit.attacks._pursuit import descend
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.audit import judged
from robustkit.losses import margin
from robustkit.problem import Problem

__all__ = ["escalated"]

_DRAWS, _STEPS = 20, 50  # of a random model, and of each further descent
_SCORES, _DECISIONS = 3000, 1000  # queries of each example


def escalated(problem: Problem) -> Tensor | None:
    """Points that a further search ends at, (N, *S), or None where there was no reason for one; a note tells what was done."""
    reasons = [flag.name for flag in judged(problem.evidence)[0]]
    flat, asked = problem.flat[problem.open].sum(), (problem.spent[problem.open]).sum()
    if 6 * flat > asked:  # about half of the gradient queries
        reasons.append("flat-gradients")
    if problem.stochastic:
        reasons.append("stochastic-target")
    left = int(problem.open.sum())
    if not reasons or not left:
        return None
    with problem.stage("escalation"):
        x_adv, done = _further(problem)
    told = f"{', '.join(reasons)}: tried {', '.join(done)}"
    problem.tell(
        "escalated", told if problem.stochastic else f"{told}; {left} examples were left, now {int(problem.open.sum())}"
    )
    return x_adv


def _further(problem: Problem) -> tuple[Tensor | None, list[str]]:
    x_adv, done = None, []
    goal = problem.goal.by(margin)
    if problem.stochastic:
        drawn = problem.drawn(_DRAWS)
        x_adv = descend(drawn.following(goal, problem.ref), problem.start(2000), _STEPS)
        done.append(f"gradients averaged over {_DRAWS} draws")
    for number, view in enumerate(problem.views[1:]):
        through = problem.seen(view)
        problem.success(descend(through.following(goal, problem.ref), problem.start(2001 + number), _STEPS))
        done.append(f"view {view}")
    for attack in (Square(queries=_SCORES), RayS(queries=_DECISIONS)):
        if attack.fits(problem.threat) and not problem.stochastic:
            problem.success(attack.run(problem))
            done.append(repr(attack))
    return x_adv, done
