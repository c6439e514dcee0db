"""The questions of the audit: each looks at one way in which a model can look robust without being so.

A probe asks about some of the examples and testifies: in so many of so many cases it was so. What it breaks on the way counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustkit._engine.output_checks import are_probabilities, non_finite_rows
from robustkit._engine.state_guard import fork_rng
from robustkit._engine.tensors import abs_max, as_rows, flatten_rows
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L1, Pixels, Threat

__all__ = ["agreement", "answers", "chosen", "company", "ordinary", "small_steps"]

_AGREES = 0.9  # a cosine below says that the gradient misleads
_FAINT = 0.01  # of the change of the loss: so small a gradient is lost in rounding
_DIRECTIONS = 5  # along which it is compared
_FEW = 3  # directions, where the two should be equal but for rounding
_SCALES = (1 / 30, 1 / 3)  # of the budget: the shortest and the longest difference
_JITTER = 0.1  # of the way to a random point of the threat set
_SMALL = 1e-6  # of the budget: the difference in float64
_SATURATED = 80.0  # so far apart, logits leave float32 probabilities no gradient
_SAME = 1e-3  # of the spread of a row of answers
_RANGES = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))  # that images have
_NORMAL = 20.0  # so far out no normalised image goes


def chosen(problem: Problem, purpose: str, share: float, *, left: bool = True) -> Tensor:
    """A share of the examples (that are `left`), each by its own lot, as indices: which they are depends on no other one."""
    lot = (problem.noise("chosen", purpose).uniform() < share).to(problem.unsolved.device)
    return (problem.unsolved & lot if left else lot).nonzero().squeeze(1)


def answers(problem: Problem) -> None:
    """What the outputs look like (undefined, saturated, probabilities), and whether they stay the same."""
    out = problem.predict(problem.x)
    if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] > 1:
        _looks(problem, out)
    company(problem, out)


def _looks(problem: Problem, out: Tensor) -> None:
    n = len(out)
    problem.record_check("undefined-outputs", non_finite_rows(out).sum(), n, 0.0)
    top = out.topk(2, 1).values
    one_hot = (out.amin(1) == top[:, 1]) & (out.shape[1] > 2)
    problem.record_check("saturated-outputs", (one_hot | (top.diff(dim=1).abs()[:, 0] > _SATURATED)).sum(), n)
    problem.record_check("probabilities", (are_probabilities(out) & ~one_hot).sum(), n)


def company(problem: Problem, out: object = None) -> None:
    """Whether a row is answered alike when it is asked again, and beside other rows; of a random model, with the same seed."""
    if problem.stochastic:
        _repeated(problem)
        return
    first, again = _rows(problem.predict(problem.x) if out is None else out), _rows(problem.predict(problem.x))
    half = torch.arange(len(problem), device=first.device).flip(0)[: max(1, len(problem) // 2)]
    alone = _rows(problem[half].predict(problem.x[half]))
    differ = _differ(first, again)
    problem.record_check("unsteady-answers", differ.sum(), len(problem), 0.0)
    other = _differ(first[half], alone)
    problem.record_check("batch-dependent", (other & ~differ[half]).sum(), len(half), 0.02)


def _repeated(problem: Problem) -> None:
    """Whether a random model says the same with the same seed: only then can a run be repeated."""
    outs = []
    for _ in range(2):
        with fork_rng(problem.noise("repeat").key):
            outs.append(_rows(problem.predict(problem.x)))
    problem.record_check("unseeded-noise", _differ(*outs).sum(), len(problem))


def _differ(one: Tensor, other: Tensor) -> Tensor:
    """Which rows differ by more than rounding, (N, K), (N, K) -> (N,) bool."""
    spread = (one.amax(1) - one.amin(1)).clamp(min=torch.finfo(one.dtype).tiny)
    return (one - other).abs().amax(1) > _SAME * spread


def _rows(out: object) -> Tensor:
    out = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(out, Tensor)
    return flatten_rows(out.detach()).float().nan_to_num()


def ordinary(problem: Problem) -> None:
    """Whether inputs look normalised: by bounds that no images have, or, of images without bounds, by their values."""
    bounds, x = problem.threat.bounds, problem.x
    if bounds is not None:
        problem.record_check("unusual-range", bounds not in _RANGES, 1)
    elif x.dim() == 4 and len(x):
        low, high = flatten_rows(x).amin(1), flatten_rows(x).amax(1)
        normal = (low < -1) | ((low < 0) & (high > 1))
        problem.record_check("unusual-range", (normal & (abs_max(x) < _NORMAL)).sum(), len(x))


def agreement(problem: Problem, rows: Tensor) -> None:
    """Whether the gradient of the margin tells how it changes over steps of the attack's size, and is not next to nothing."""
    low, high = _SCALES
    scales = [low * (high / low) ** (number / (_DIRECTIONS - 1)) for number in range(_DIRECTIONS)]
    misleading, faint = _compared(problem.fresh_copy("last")[rows], scales)
    problem.record_check("gradients-disagree", misleading, len(rows))
    problem.record_check("faint-gradients", faint, len(rows))


def small_steps(problem: Problem, rows: Tensor) -> None:
    """Whether the gradient is the derivative, in float64, where the model can be copied to it."""
    double = problem.in_double() if len(rows) else None
    if double is None or problem.stochastic:
        return
    try:
        hits = _compared(double[rows], [_SMALL] * _FEW)[0]
    except RuntimeError:  # a model may well insist on float32 inside
        return
    problem.record_check("small-steps-disagree", hits, len(rows))


def _compared(problem: Problem, scales: list[float]) -> tuple[Tensor, Tensor]:
    """How many gradients point elsewhere than central differences along random directions, and how many are next to nothing.

    The directions have these lengths, in budgets.
    """
    if not len(problem):
        return torch.zeros(()), torch.zeros(())
    problem = problem.with_surrogate(problem.goal.with_surrogate(margin), problem.ref)
    threat = problem.threat
    moves = [_direction(problem, number, scale) for number, scale in enumerate(scales)]
    # Near x, where robustness is claimed, but off the ties of constant backgrounds; far out even sound nets are bent.
    x_adv = problem.x + _JITTER * (problem.start(1000) - problem.x)
    x_adv = _inside(threat, x_adv, torch.stack([abs_max(move) for move in moves]).amax(0))
    key = problem.noise("probe").key
    with fork_rng(key):
        _, grad = problem.loss_and_grad(x_adv)
    ends = [end for move in moves for end in (x_adv + move, x_adv - move)]
    losses = _losses(problem, ends, key)
    length = torch.as_tensor(scales, dtype=torch.float64, device=x_adv.device)
    one = (losses[:, ::2] - losses[:, 1::2]) / (2 * length)
    two = torch.stack([(flatten_rows(grad).double() * flatten_rows(move).double()).sum(1) for move in moves], 1) / length
    cosine = (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))
    length_told = two.norm(dim=1)  # a gradient of zero is counted as that, wherever it comes from
    return (~(cosine >= _AGREES)).sum(), ((length_told > 0) & (length_told < _FAINT * one.norm(dim=1))).sum()


def _losses(problem: Problem, points: list[Tensor], key: int) -> Tensor:
    """The losses at several points of each example in float64, (N, M); of a random model each with the same noise."""
    at_once = 1 if problem.stochastic else max(1, problem.batch_size // len(problem))
    everyone, columns = torch.arange(len(problem), device=problem.x.device), []
    for first in range(0, len(points), at_once):
        some = points[first : first + at_once]
        with fork_rng(key):
            losses = problem[everyone.repeat(len(some))].loss(torch.cat(some))
        columns += list(losses.double().reshape(len(some), -1))
    return torch.stack(columns, 1)


def _direction(problem: Problem, number: int, scale: float) -> Tensor:
    noise = problem.noise("probe", number).normal(*problem.x.shape[1:]).to(problem.x)
    zero = torch.zeros_like(problem.x)
    wide = type(problem.threat) in (Pixels, L1)  # of these a step would change next to nothing, or too much
    return problem.threat.move(noise, zero, zero, scale * problem.threat.budget) if not wide else noise.sign() * scale / 10


def _inside(threat: Threat, x_adv: Tensor, room: Tensor) -> Tensor:
    """`x_adv` moved so that it can go `room` (N,) each way without leaving the box."""
    if threat.bounds is None:
        return x_adv
    low, high = threat.bounds
    space = as_rows(room.clamp(max=(high - low) / 2), x_adv)
    assert isinstance(space, Tensor)
    return torch.minimum(torch.maximum(x_adv, low + space), high - space)
