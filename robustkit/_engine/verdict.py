"""The last word on a run: which point comes back for each example, and whether it holds when it is asked again."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from robustkit._engine.best_so_far import BestSoFar
from robustkit._engine.ledger import Message
from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import expand_rows
from robustkit.goals import Goal
from robustkit.problem import Problem
from robustkit.target import Target

__all__ = ["FRESH_DRAWS", "SELECTION_DRAWS", "float32_note", "verdict"]

SELECTION_DRAWS = 16  # on which a stochastic target's candidates compete
FRESH_DRAWS = 40  # on which the winner is scored; never searched, so that its rate is no winner's curse

_UNDECLARED = Message(
    "undeclared-randomness",
    "the target draws random numbers, and nobody has said that it should: was dropout left on? Where it is meant, declare "
    "Target(stochastic=True), or in the bench `stochastic = True` on the module",
)

Verdict = tuple[Tensor, Tensor, Tensor, list[Message], list[Message]]  # x_adv, success, rate, flags, notes


def verdict(problem: Problem, kept: BestSoFar, x_last: Tensor, met: Tensor) -> Verdict:
    """The point that comes back for each example, and what the deployed function says of it.

    Args:
        problem: The attacked examples.
        kept: What the run has kept.
        x_last: The last iterates, inside the threat, (N, *S).
        met: Examples solved without any change, whose one forward was their verdict, (N,) bool.
    """
    if kept.keep in ("best", "smallest") and not kept.stochastic and len(problem):
        problem.loss(x_last)  # the last iterate competes too
    x_adv = torch.where(expand_rows(kept.best.found | (kept.best.score < torch.inf), x_last), kept.best.x_adv, x_last)
    success = met.clone()
    asked = (~met).nonzero().squeeze(1)
    if len(asked) and not kept.stochastic:
        success[asked] = problem.recount(x_adv, asked)
    if kept.stochastic:  # looked at here, since an attack that never asks learns it from these questions
        return _of_stochastic(problem, kept, x_last)
    lost = kept.best.found & ~success
    if lost.any():
        return _of_unsteady(problem, x_adv, int(lost.sum()))
    return x_adv, success, success.float(), [], []


def _of_stochastic(problem: Problem, kept: BestSoFar, x_last: Tensor) -> Verdict:
    candidates = [x_last]
    if kept.tracks_best:
        candidates += [kept.best.x_adv, kept.lowest.x_adv]
        candidates += [problem.x] if problem.goal.counts_if_already_true and kept.keep != "best" else []
    x_adv, best = x_last, None
    for candidate in candidates if len(candidates) > 1 else []:
        rate = _rate(problem, candidate, "selection", SELECTION_DRAWS)
        better = torch.ones_like(rate, dtype=torch.bool) if best is None else rate > best
        x_adv = torch.where(expand_rows(better, x_last), candidate, x_adv)
        best = rate if best is None else torch.maximum(rate, best)
    rate = _rate(problem, x_adv, "fresh", FRESH_DRAWS)
    why = f"the target draws random numbers; success means on more than half of {FRESH_DRAWS} fresh draws"
    return x_adv, rate > 0.5, rate, [] if kept.declared else [_UNDECLARED], [Message("stochastic-target", why)]


def _of_unsteady(problem: Problem, x_adv: Tensor, lost: int) -> Verdict:
    """A success that does not repeat on a target that seemed deterministic: everything is scored on fresh draws."""
    rate = _rate(problem, x_adv, "fresh", FRESH_DRAWS)
    why = f"{lost} of {len(problem)} successes failed when asked again; all were scored on {FRESH_DRAWS} further calls"
    message = Message("unsteady-target", why + "; declare Target(stochastic=True)")
    # A rounding difference between batches settles on one answer; randomness that nobody declared does not.
    steady = bool(((rate == 0) | (rate == 1)).all())
    return x_adv, rate > 0.5, rate, [] if steady else [message], [message] if steady else []


def float32_note(target: Target, x_adv: Tensor, ref: Tensor, goal: Goal, success: Tensor) -> Message:
    """How the successes of a half-precision model, (N,) bool, fare with the same weights in float32.

    Only a target that is a module itself can be copied to float32; of others it is told that nobody looked. These passes
    are not those of the model under attack, and are not counted.
    """
    told = f"judged in {str(x_adv.dtype).removeprefix('torch.')}"
    if not isinstance(target.fn, nn.Module):
        return Message("half-precision", told + "; the target is no plain module, so float32 was not tried")
    held_up, size = 0, target.batch_size
    try:
        with torch.no_grad(), fork_rng(0):
            model = deepcopy(target.fn).float()
            for first in range(0, len(x_adv), size):
                rows = slice(first, first + size)
                held_up += int((goal.success(model(x_adv[rows].float()), ref[rows]) & success[rows]).sum())
    except Exception as error:  # a model may well insist on half precision inside
        return Message("half-precision", f"{told}; float32 was not possible ({type(error).__name__})")
    return Message(
        "half-precision", f"{told}; with the same weights in float32 {held_up} of {int(success.sum())} successes hold"
    )


def _rate(problem: Problem, x_adv: Tensor, purpose: str, draws: int) -> Tensor:
    """The share of draws on which the goal holds; the draws are the same whatever the attack has done to the generators."""
    everyone = torch.arange(len(problem), device=x_adv.device)
    with fork_rng(problem.noise(purpose, int(problem.ids[0])).key):
        return torch.stack([problem.recount(x_adv, everyone) for _ in range(draws)]).float().mean(0)
