"""The attacks of the audit: small ones side by side, of which a sound model lets the stronger win, and ones without gradients.

Each testifies: in so many of so many cases it was so. What it breaks on the way counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from robustkit._engine.tensors import flatten_rows
from robustkit.attacks._max_threat import max_threat
from robustkit.attacks.pgd import PGD
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.attacks.standard.cascade import descend
from robustkit.attacks.standard.gradient_checks import chosen
from robustkit.attacks.standard.substitute import SubstituteConfig, random_tiles, train_substitute, transfer_attack
from robustkit.goals import Goal
from robustkit.problem import Problem
from robustkit.threats import Linf, Threat

__all__ = ["BeyondHyperplane", "binarised", "max_threat", "raw_runs", "survivors", "unbounded"]

_LITTLE, _MUCH = 5, 20  # steps of raw runs, of one path length
_REACH: Final = 2.5  # that length in budgets
_CLOSER = 0.1  # of the way that a run has gone: so much more says that it was not at its end
_FREE = 12  # steps without a budget
_SCORES, _DECISIONS = 24, 24  # queries without gradients
_COPY = SubstituteConfig(points=12, steps=30, batch=128, rate=3e-3)
_INNER, _OUTER = 24, 8  # points inside and at the edge of the ball, between which a readout is put
_INSIDE = 0.75  # of the way out lie the inner ones
_RIDGE = 1e-2  # of the mean variance of the features
_LISTED = 0.2  # of examples that have an adversarial point by construction, a sound model may hide so many


class Walk(NamedTuple):
    """Plain gradient steps of one length: for which cases (M,) of a problem, from where, within what, and how many."""

    rows: Tensor
    start: Tensor
    eps: Tensor
    steps: int


def raw_runs(problem: Problem, rows: Tensor) -> None:
    """Whether more steps, more restarts or a larger budget leave more examples robust than less of them does.

    Nothing is reused, all runs go side by side. The longest is then tried once more from its best point with half the step.
    """
    if not len(rows):
        return
    for part in torch.split(rows, max(1, problem.batch_size // 5)):
        some = problem[part]
        eps, here = _budgets(some), [some.start(draw) for draw in range(3)]
        twice = torch.minimum(2 * eps, _budgets(some, max_threat(some.threat, some.x)))
        larger = replace(some.threat, eps=twice).sample(some.x, some.noise("start", 0))
        walks = [
            Walk(part, here[0], eps, _LITTLE),
            Walk(part, here[0], eps, _MUCH),
            Walk(part, here[1], eps, _LITTLE),
            Walk(part, here[2], eps, _LITTLE),
            Walk(part, larger, twice, _LITTLE),
        ]
        little, more, *several, wide = _walked(problem, walks)
        _compare(problem, "more-steps-leave-more", little, more)
        _compare(problem, "more-restarts-leave-more", little, torch.stack(several).any(0))
        _compare(problem, "larger-eps-leaves-more", little, wide)


def _walked(problem: Problem, walks: Sequence[Walk]) -> list[Tensor]:
    """Which examples each of the walks solves, (M,) bool each; what the ones within the budget find counts."""
    rows, start = torch.cat([walk.rows for walk in walks]), torch.cat([walk.start for walk in walks])
    eps = torch.cat([walk.eps for walk in walks])
    steps = torch.cat([torch.full_like(walk.rows, walk.steps) for walk in walks])
    cases = problem.subproblem(rows, threat=replace(problem.threat, eps=eps))
    lengths = _REACH / steps * torch.as_tensor(cases.threat.budget, dtype=torch.float64, device=eps.device)
    x_adv, best, lowest, first = _steps(cases, start, lengths, steps)
    solved = cases.reliably_reached(x_adv)
    longest = (steps == steps.max()).nonzero().squeeze(1)
    if len(problem.views) > 1 or problem.views[0] != "exact":
        _believed(cases[longest], x_adv[longest], solved[longest], problem)
    _halved(cases[longest], best[longest], lowest[longest], first[longest], lengths[longest] / 2, problem)
    problem.charge(rows, cases)
    within = eps <= _budgets(problem[rows])
    mine = (solved & within).nonzero().squeeze(1)
    if len(mine) and not problem.stochastic:
        problem[rows[mine]].success(cases.best[mine])
    return list(torch.split(solved, [len(walk.rows) for walk in walks]))


def _steps(problem: Problem, x_adv: Tensor, lengths: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As many steps as each case is to go; the last point, the best one, the loss there, and that of the first."""
    best, lowest = x_adv, torch.full((len(x_adv),), torch.inf, dtype=x_adv.dtype, device=x_adv.device)
    first = lowest
    for step in range(int(steps.max())):
        going = ((steps > step) & (problem.unsolved if problem.early_stop else steps > 0)).nonzero().squeeze(1)
        if not len(going):
            break
        some = problem[going]
        loss, grad = some.loss_and_grad(x_adv[going])
        first = first.index_copy(0, going, loss) if step == 0 else first
        better = going[loss < lowest[going]]
        best = best.index_copy(0, better, x_adv[better])
        lowest = lowest.index_copy(0, going, torch.minimum(loss, lowest[going]))
        moved = some.threat.project(some.threat.move(-grad, x_adv[going], some.x, lengths[going]), some.x)
        x_adv = x_adv.index_copy(0, going, moved)
    return x_adv, best, lowest, first


def _halved(problem: Problem, best: Tensor, lowest: Tensor, first: Tensor, lengths: Tensor, told: Problem) -> None:
    """Testify how often half the step gets markedly closer from where a run was at its best.

    Source: Pintor et al. 2022, "Indicators of attack failure", the indicator of an incomplete optimisation
        (https://arxiv.org/abs/2106.09947). There the slope of the loss at the end is looked at, here what going on would bring.
    """
    left = problem.unsolved.nonzero().squeeze(1)
    if not len(left) or problem.stochastic:
        return
    some = problem[left]
    before, way = lowest[left], (first - lowest)[left]
    after = _steps(some, best[left], lengths[left], torch.full_like(left, _LITTLE))[2]
    told.record_check("plateau", (~some.unsolved | (before - after > _CLOSER * way)).sum(), len(left))


def _believed(problem: Problem, x_adv: Tensor, solved: Tensor, told: Problem) -> None:
    """Testify how many of the points that fool the view which is followed do not fool the model.

    Source: Pintor et al. 2022, the indicator of a transfer failure.
    """
    fools = problem.goal.success(problem.predict_and_vjp(x_adv)[0], problem.ref)
    told.record_check("view-misleads", (fools & ~solved).sum(), int(fools.sum()))


def _compare(problem: Problem, name: str, less: Tensor, more: Tensor) -> None:
    problem.record_check(name, (less & ~more).sum(), int((less != more).sum()))


def unbounded(problem: Problem, rows: Tensor) -> None:
    """Whether examples withstand gradients without any budget, from x: of K answers at most one in K may be right by chance.

    Without a budget the norm is a matter of the path alone. Signs it is: along plain gradients even sound nets get stuck.
    """
    if not len(rows) or problem.threat.bounds is None:
        return
    low, high = problem.threat.bounds
    free = problem.subproblem(rows, threat=Linf(high - low, problem.threat.bounds))
    kinds = 1 + len(problem.goal.parts(free.predict(free.x), free.ref))
    withstood = ~free.reliably_reached(PGD(steps=_FREE, random_start=False).run(free))
    problem.charge(rows, free)
    problem.record_check("unbounded-leaves-robust", withstood.sum(), len(rows), 1 / max(2, kinds))


def survivors(problem: Problem, share: float) -> None:
    """Break what is left without gradients: by rough points, scores, decisions for a share, and a copy; every break counts."""
    rows = problem.unsolved.nonzero().squeeze(1)
    if problem.stochastic or not len(rows):
        return
    copy = train_substitute(problem, _COPY)
    for attack, part in ((Square(queries=_SCORES), 1.0), (RayS(queries=_DECISIONS), share)):
        some = problem[chosen(problem, repr(attack), part)]
        if attack.supports(problem.threat) and len(some):
            some.success(attack.run(some))
    problem.record_check("gradient-free-breaks", (~problem.unsolved[rows]).sum(), len(rows), 0.01)
    left = problem.unsolved.nonzero().squeeze(1)
    if copy is not None and len(left):
        for _ in transfer_attack(problem, copy, _COPY):
            pass
        problem.record_check("transfer-breaks", (~problem.unsolved[left]).sum(), len(left), 0.01)


@final
@dataclass(frozen=True, repr=False)
class BeyondHyperplane(Goal):
    """Features on the other side of a plane. `ref`: its normal and its offset, (N, D + 1)."""

    def loss(self, out: Any, ref: Tensor) -> Tensor:
        """How far the features are from the plane, (N,); negative on the other side."""
        return -((flatten_rows(out) * ref[:, :-1].to(out)).sum(1) + ref[:, -1].to(out))

    def success(self, out: Any, ref: Tensor) -> Tensor:
        """Beyond the plane."""
        return self.loss(out, ref) < 0


def binarised(problem: Problem, rows: Tensor) -> None:
    """Whether a descent of the evaluation finds what is there by construction, where the target gives its features.

    For each example a plane is put between the features of points inside the ball and those of one point at its edge. That one
    is an adversarial example of the model whose last layer is the plane; who does not find any is too weak for the features.

    Source: Zimmermann, Brendel, Tramer & Carlini 2022, "Increasing confidence in adversarial robustness evaluations",
        algorithm 1 (https://arxiv.org/abs/2206.13991). There the readout is trained; here it is Fisher's, in closed form,
        halfway between the outer point and the nearest inner one.
    """
    features = problem.features
    if features is None or problem.stochastic or not len(rows):
        return
    some = problem[rows]
    seen = problem.subproblem(rows, keep="last", fn=features, goal=BeyondHyperplane(), ref=some.x.new_zeros(len(rows), 2))
    first = seen.predict(some.x)
    if not isinstance(first, Tensor):
        return
    ends = [some.x + _INSIDE * (some.start(4000 + draw) - some.x) for draw in range(_INNER)]
    inner = torch.stack([flatten_rows(first), *(flatten_rows(seen.predict(end)) for end in ends)], 1).double()
    outer = torch.stack([flatten_rows(seen.predict(random_tiles(some, 4000 + draw))) for draw in range(_OUTER)], 1).double()
    problem.charge(rows, seen)
    planes, apart = _planes(inner.detach(), outer.detach())
    listed = apart.nonzero().squeeze(1)
    if not len(listed):
        return
    cases = problem.subproblem(rows[listed], fn=features, goal=BeyondHyperplane(), ref=planes[listed])
    cases.success(descend(cases, cases.start(4000 + _INNER), _MUCH))
    problem.charge(rows[listed], cases)
    problem.record_check("binarisation-missed", cases.unsolved.sum(), len(listed), _LISTED)


def _planes(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Planes between the inner points (N, M, D) and the one of the outer ones (N, L, D) that stands out most.

    Returns:
        The planes, (N, D + 1), and for which examples there is one, (N,) bool.

    Fisher's direction (S + r I)^-1 (o - m) with the inner points' mean m and covariance S, by the M x M system that stands for
    the D x D one; scaled so that the outer point scores 1 and the nearest inner one -1.
    """
    count, size = inner.shape[1:]
    mean = inner.mean(1, keepdim=True)
    spread, way = inner - mean, outer - mean
    ridge = (_RIDGE * spread.square().sum((1, 2)) / (count * size)).clamp(min=1e-12)[:, None, None]
    small = spread @ spread.mT + count * ridge * torch.eye(count, dtype=inner.dtype, device=inner.device)
    normal = (way - (torch.linalg.solve(small, spread @ way.mT)).mT @ spread) / ridge  # (N, L, D)
    near, far = (inner @ normal.mT).amax(1), (outer * normal).sum(2)  # (N, L) each
    gap, best = ((far - near) / normal.norm(dim=2).clamp(min=1e-300)).max(1)
    at = best[:, None]
    near, far = near.gather(1, at), far.gather(1, at)
    normal = normal[torch.arange(len(normal), device=normal.device), best]
    scale = 2 / (far - near).clamp(min=1e-300)
    planes = torch.cat([normal * scale, -(near + far) / 2 * scale], 1)
    return planes, (gap > 0) & planes.isfinite().all(1)


def _budgets(problem: Problem, threat: Threat | None = None) -> Tensor:
    eps = torch.as_tensor((threat or problem.threat).eps, dtype=torch.float64)
    return eps.to(problem.x.device).expand(len(problem))
