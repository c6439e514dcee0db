"""The questions of the audit: each looks at one way in which a model can look robust without being so.

A probe asks about some of the examples and testifies: in so many of so many cases it was so. What it breaks on the way counts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustkit._tensors import amax, as_rows, flat
from robustkit._world import seeded
from robustkit.attack import Attack
from robustkit.attacks.pgd import PGD
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.losses import margin
from robustkit.problem import Problem
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = [
    "agreement",
    "answers",
    "chosen",
    "company",
    "everything",
    "ordinary",
    "raw_runs",
    "small_steps",
    "survivors",
    "unbounded",
]

_AGREES = 0.9  # a cosine below says that the gradient misleads
_DIRECTIONS = 6  # along which it is compared
_SCALES = (1 / 30, 1 / 3)  # of the budget: the shortest and the longest difference
_JITTER = 0.1  # of the way to a random point of the threat set
_SMALL = 1e-6  # of the budget: the difference in float64
_SCORES, _DECISIONS = 100, 100  # queries without gradients
_SATURATED = 80.0  # so far apart, logits leave float32 probabilities no gradient
_SAME = 1e-3  # of the spread of a row of answers


def chosen(problem: Problem, purpose: str, share: float, *, left: bool = True) -> Tensor:
    """A share of the examples (that are `left`), each by its own lot, as indices: which they are depends on no other one."""
    lot = (problem.noise("chosen", purpose).uniform() < share).to(problem.open.device)
    return (problem.open & lot if left else lot).nonzero().squeeze(1)


def answers(problem: Problem) -> None:
    """What the outputs look like: undefined, saturated, or probabilities."""
    out = problem.answer(problem.x)
    if not isinstance(out, Tensor) or out.dim() != 2 or out.shape[1] < 2:
        return
    n = len(out)
    problem.testify("undefined-outputs", (out.isnan() | (out == torch.inf)).any(1).sum(), n, 0.0)
    top = out.topk(2, 1).values
    one_hot = (out.amin(1) == top[:, 1]) & (out.shape[1] > 2)
    problem.testify("saturated-outputs", (one_hot | (top.diff(dim=1).abs()[:, 0] > _SATURATED)).sum(), n)
    problem.testify("probabilities", ((out >= 0).all(1) & ((out.sum(1) - 1).abs() < _SAME) & ~one_hot).sum(), n)


def company(problem: Problem) -> None:
    """Whether a row is answered alike when it is asked again, and beside other rows."""
    if problem.stochastic:
        return
    first, again = (_rows(problem.answer(problem.x)) for _ in range(2))
    half = torch.arange(len(problem), device=first.device).flip(0)[: max(1, len(problem) // 2)]
    alone = _rows(problem[half].answer(problem.x[half]))
    spread = (first.amax(1) - first.amin(1)).clamp(min=torch.finfo(first.dtype).tiny)
    differ = (first - again).abs().amax(1) > _SAME * spread
    problem.testify("unsteady-answers", differ.sum(), len(problem), 0.0)
    other = (first[half] - alone).abs().amax(1) > _SAME * spread[half]
    problem.testify("batch-dependent", (other & ~differ[half]).sum(), len(half), 0.02)


def _rows(out: object) -> Tensor:
    out = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(out, Tensor)
    return flat(out.detach()).float().nan_to_num()


def ordinary(problem: Problem) -> None:
    """Whether inputs are valid over a range that images have."""
    if problem.threat.bounds is not None:
        problem.testify("unusual-range", problem.threat.bounds not in ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)), 1)


def agreement(problem: Problem, rows: Tensor) -> None:
    """Whether the gradient of the margin tells how it changes over steps of the attack's own size."""
    low, high = _SCALES
    scales = [low * (high / low) ** (number / (_DIRECTIONS - 1)) for number in range(_DIRECTIONS)]
    problem.testify("gradients-disagree", _misleading(problem.afresh("last")[rows], scales), len(rows))


def small_steps(problem: Problem, rows: Tensor) -> None:
    """Whether the gradient is the derivative, in float64, where the model can be copied to it."""
    double = problem.in_double() if len(rows) else None
    if double is None or problem.stochastic:
        return
    try:
        hits = _misleading(double[rows], [_SMALL] * _DIRECTIONS)
    except RuntimeError:  # a model may well insist on float32 inside
        return
    problem.testify("small-steps-disagree", hits, len(rows))


def _misleading(problem: Problem, scales: list[float]) -> Tensor:
    """How many gradients point elsewhere than central differences along random directions of these lengths, in budgets."""
    if not len(problem):
        return torch.zeros(())
    problem = problem.following(problem.goal.by(margin), problem.ref)
    threat = problem.threat
    moves = [_direction(problem, number, scale) for number, scale in enumerate(scales)]
    # Near x, where robustness is claimed, but off the ties of constant backgrounds; far out even sound nets are bent.
    x_adv = problem.x + _JITTER * (problem.start(1000) - problem.x)
    x_adv = _inside(threat, x_adv, torch.stack([amax(move) for move in moves]).amax(0))
    key = problem.noise("probe").key
    with seeded(key):
        _, grad = problem.loss_and_grad(x_adv)
    found, told = [], []
    for move, scale in zip(moves, scales, strict=True):
        ends = []
        for end in (x_adv + move, x_adv - move):
            with seeded(key):  # the same noise on both sides
                ends.append(problem.loss(end).double())
        found.append((ends[0] - ends[1]) / (2 * scale))
        told.append((flat(grad).double() * flat(move).double()).sum(1) / scale)
    one, two = torch.stack(found, 1), torch.stack(told, 1)
    cosine = (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))
    misleads: Tensor = ~(cosine >= _AGREES)
    return misleads.sum()


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


def raw_runs(problem: Problem, rows: Tensor) -> None:
    """Whether more steps, more restarts or a larger budget leave more examples robust than less of them does."""
    if problem.stochastic or not len(rows):
        return
    some = problem[rows]
    little = _solved(problem, rows, PGD(steps=10))
    _compare(problem, "more-steps-leave-more", little, _solved(problem, rows, PGD(steps=40)))
    several = torch.stack([_solved(problem, rows, PGD(steps=10), draw) for draw in range(1, 3)]).any(0)
    _compare(problem, "more-restarts-leave-more", little, several)
    twice = replace(some.threat, eps=torch.minimum(2 * _budgets(some), _budgets(some, everything(some.threat, some.x))))
    larger = some.afresh("first", twice)
    PGD(steps=10).run(larger)
    _compare(problem, "larger-eps-leaves-more", little, ~larger.open)


def _solved(problem: Problem, rows: Tensor, attack: Attack, draw: int = 0) -> Tensor:
    """Which of the examples an attack solves that starts from nothing; what it finds counts."""
    some = problem[rows]
    fresh = some.afresh("first", draw=draw)
    x_last = attack.run(fresh)
    fresh.success(x_last)
    solved = ~fresh.open
    some[solved].success(fresh.best[solved])
    return solved


def _compare(problem: Problem, name: str, less: Tensor, more: Tensor) -> None:
    problem.testify(name, (less & ~more).sum(), int((less != more).sum()))


def unbounded(problem: Problem, rows: Tensor) -> None:
    """Whether examples withstand gradients without any budget, from x: of K answers at most one in K may be right by chance.

    Without a budget the norm is a matter of the path alone. Signs it is: along plain gradients even sound nets get stuck.
    """
    some = problem[rows]
    if problem.stochastic or not len(rows) or some.threat.bounds is None:
        return
    low, high = some.threat.bounds
    fresh = some.afresh("first", Linf(high - low, some.threat.bounds))
    kinds = 1 + len(problem.goal.parts(some.answer(some.x), some.ref))
    fresh.success(PGD(steps=40, random_start=False).run(fresh))
    problem.testify("unbounded-leaves-robust", fresh.open.sum(), len(rows), 1 / max(2, kinds))


def survivors(problem: Problem, share: float) -> None:
    """Break what is left without gradients, by scores and, for a share of it, by decisions; every break counts."""
    rows = problem.open.nonzero().squeeze(1)
    attacks = [(Square(queries=_SCORES), 1.0), (RayS(queries=_DECISIONS), share)]
    attacks = [(attack, part) for attack, part in attacks if attack.fits(problem.threat)]
    if problem.stochastic or not len(rows) or not attacks:
        return
    for attack, part in attacks:
        some = problem[chosen(problem, repr(attack), part)]
        some.success(attack.run(some))
    problem.testify("gradient-free-breaks", (~problem.open[rows]).sum(), len(rows), 0.01)


def everything(threat: Threat, x: Tensor) -> Threat:
    """The same kind of threat with a budget that reaches every valid input."""
    low, high = threat.bounds or (0.0, 1.0)
    width, size = high - low, math.prod(x.shape[1:])
    budgets = {Linf: width, L2: width * size**0.5, L1: width * size, Pixels: math.prod(x.shape[2:])}
    return replace(threat, eps=budgets[type(threat)])


def _budgets(problem: Problem, threat: Threat | None = None) -> Tensor:
    return torch.as_tensor((threat or problem.threat).eps, dtype=torch.float64).expand(len(problem))
