"""The final evaluation of a run: the point returned for each example, and whether it reaches the goal in a new query."""

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

SELECTION_DRAWS = 16  # for choosing between the candidates of an example on a stochastic target
FRESH_DRAWS = 40  # for the success rate of the chosen one; never used for the choice, which would bias it upwards

_UNDECLARED = Message(
    "undeclared-randomness",
    "the target draws random numbers but does not declare it: was dropout left on? If it is intended, declare "
    "Target(stochastic=True), or in the bench `stochastic = True` on the module",
)

Verdict = tuple[Tensor, Tensor, Tensor, list[Message], list[Message]]  # x_adv, success, rate, flags, notes


def verdict(problem: Problem, best: BestSoFar, x_last: Tensor, initially_successful: Tensor) -> Verdict:
    """Choose the returned point of each example, and evaluate it on the deployed function.

    Args:
        problem: The attacked examples.
        best: The best points of the run.
        x_last: The last iterates, inside the threat, (N, *S).
        initially_successful: Examples that reach the goal without a perturbation, (N,) bool; they are not queried again.

    Returns:
        The points (N, *S), whether they reach the goal (N,) bool, the share of fresh draws on which they do (N,) float32,
        flags and notes.
    """
    if best.keep in ("best", "smallest") and not best.stochastic and len(problem):
        problem.loss(x_last)  # the last iterate competes too
    has_point = best.best.success | (best.best.score < torch.inf)
    x_adv = torch.where(expand_rows(has_point, x_last), best.best.x_adv, x_last)
    success = initially_successful.clone()
    rows = (~initially_successful).nonzero().squeeze(1)
    if len(rows) and not best.stochastic:
        success[rows] = problem.evaluate(x_adv, rows)
    if best.stochastic:  # checked after the query above, which is the first one if the attack made none
        return _verdict_stochastic(problem, best, x_last)
    lost = best.best.success & ~success
    if lost.any():
        return _verdict_unsteady(problem, x_adv, int(lost.sum()))
    return x_adv, success, success.float(), [], []


def _verdict_stochastic(problem: Problem, best: BestSoFar, x_last: Tensor) -> Verdict:
    """Choose the candidate with the highest success rate on selection draws; its rate is estimated on fresh draws."""
    candidates = [x_last]
    if best.tracks_best:
        candidates += [best.best.x_adv, best.lowest.x_adv]
        candidates += [problem.x] if problem.goal.counts_if_already_true and best.keep != "best" else []
    x_adv, best_rate = x_last, None
    for candidate in candidates if len(candidates) > 1 else []:
        rate = _success_rate(problem, candidate, "selection", SELECTION_DRAWS)
        better = torch.ones_like(rate, dtype=torch.bool) if best_rate is None else rate > best_rate
        x_adv = torch.where(expand_rows(better, x_last), candidate, x_adv)
        best_rate = rate if best_rate is None else torch.maximum(rate, best_rate)
    rate = _success_rate(problem, x_adv, "fresh", FRESH_DRAWS)
    why = f"the target draws random numbers; success means on more than half of {FRESH_DRAWS} fresh draws"
    return x_adv, rate > 0.5, rate, [] if best.declared else [_UNDECLARED], [Message("stochastic-target", why)]


def _verdict_unsteady(problem: Problem, x_adv: Tensor, lost: int) -> Verdict:
    """Score all examples on fresh draws, since a success did not repeat on a target that seemed deterministic."""
    rate = _success_rate(problem, x_adv, "fresh", FRESH_DRAWS)
    why = f"{lost} of {len(problem)} successes failed when queried again; all were scored on {FRESH_DRAWS} further calls"
    message = Message("unsteady-target", why + "; declare Target(stochastic=True)")
    # Rounding that depends on the batch gives the same outcome on every fresh draw; undeclared randomness does not.
    repeatable = bool(((rate == 0) | (rate == 1)).all())
    return x_adv, rate > 0.5, rate, [] if repeatable else [message], [message] if repeatable else []


def float32_note(target: Target, x_adv: Tensor, ref: Tensor, goal: Goal, success: Tensor) -> Message:
    """A note on how many successes of a half-precision model, (N,) bool, hold with the same weights in float32.

    Only a target that is a plain module can be copied to float32; for others the note says that this was not tried. These
    forward passes are not queries of the model under attack and are not counted.
    """
    dtype = f"evaluated in {str(x_adv.dtype).removeprefix('torch.')}"
    if not isinstance(target.fn, nn.Module):
        return Message("half-precision", f"{dtype}; the target is not a plain module, so float32 was not tried")
    count, size = 0, target.batch_size
    try:
        with torch.no_grad(), fork_rng(0):
            model = deepcopy(target.fn).float()
            for first in range(0, len(x_adv), size):
                rows = slice(first, first + size)
                count += int((goal.success(model(x_adv[rows].float()), ref[rows]) & success[rows]).sum())
    except Exception as error:  # a model may require half precision inside
        return Message("half-precision", f"{dtype}; float32 was not possible ({type(error).__name__})")
    return Message(
        "half-precision", f"{dtype}; with the same weights in float32 {count} of {int(success.sum())} successes hold"
    )


def _success_rate(problem: Problem, x_adv: Tensor, purpose: str, draws: int) -> Tensor:
    """The share of draws on which the goal is reached, (N,) float32; the seed does not depend on what the attack has drawn."""
    rows = torch.arange(len(problem), device=x_adv.device)
    with fork_rng(problem.noise(purpose, int(problem.ids[0])).key):
        return torch.stack([problem.evaluate(x_adv, rows) for _ in range(draws)]).float().mean(0)
