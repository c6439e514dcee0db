"""The checks of the audit that run attacks: weak against strong ones, without a budget, without gradients, on features.

Each records in how many of how many cases it was positive. What an attack breaks within the budget counts for the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from robustkit._engine.tensors import flatten_rows
from robustkit.attacks._descent import BestPoint, gradient_descent
from robustkit.attacks._max_threat import max_threat
from robustkit.attacks.pgd import PGD
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.attacks.standard.cascade import descend
from robustkit.attacks.standard.gradient_checks import sample_rows
from robustkit.attacks.standard.substitute import SubstituteConfig, random_tiles, train_substitute, transfer_attack
from robustkit.goals import Goal
from robustkit.problem import Problem
from robustkit.threats import Linf, Threat

__all__ = ["BeyondHyperplane", "check_binarised", "check_gradient_free", "check_monotonicity", "check_unbounded"]

_FEW_STEPS, _MANY_STEPS = 5, 20  # of PGD runs whose paths have the same length
_REACH: Final = 2.5  # that length in budgets
_PROGRESS = 0.1  # further decrease of the loss, as a share of that of the run, beyond which the run had not converged
_UNBOUNDED_STEPS = 12
_SCORE_QUERIES, _DECISION_QUERIES = 24, 24
_SUBSTITUTE = SubstituteConfig(points=12, steps=30, batch=128, learning_rate=3e-3)
_INNER, _OUTER = 24, 8  # points inside the ball and on its surface that the hyperplane of the binarisation test separates
_INNER_SHARE = 0.75  # the inner points lie within this share of the ball
_RIDGE = 1e-2  # regularisation, as a share of the mean variance of the features
_MISSED_LIMIT = 0.2  # the share of adversarial examples known by construction that may be missed on a sound model


class RunSpec(NamedTuple):
    """PGD with a constant step size, for cases (M,) of a problem.

    Attributes:
        rows: Indices of the examples, (M,).
        start: The first points, (M, *S).
        eps: The budgets, (M,).
        steps: Number of steps.
    """

    rows: Tensor
    start: Tensor
    eps: Tensor
    steps: int


def check_monotonicity(problem: Problem, rows: Tensor) -> None:
    """Check whether more steps, more restarts or a larger budget leave more examples robust than a weaker attack does.

    All runs are independent and share their batches. The run with the most steps is then continued from its best point with
    half the step size, to see whether it had converged.
    """
    if not len(rows):
        return
    for part in torch.split(rows, max(1, problem.batch_size // 5)):
        examples = problem[part]
        eps, starts = _budgets(examples), [examples.start(draw) for draw in range(3)]
        twice = torch.minimum(2 * eps, _budgets(examples, max_threat(examples.threat, examples.x)))
        wider_start = replace(examples.threat, eps=twice).sample(examples.x, examples.noise("start", 0))
        runs = [
            RunSpec(part, starts[0], eps, _FEW_STEPS),
            RunSpec(part, starts[0], eps, _MANY_STEPS),
            RunSpec(part, starts[1], eps, _FEW_STEPS),
            RunSpec(part, starts[2], eps, _FEW_STEPS),
            RunSpec(part, wider_start, twice, _FEW_STEPS),
        ]
        weak, more_steps, *restarts, larger_eps = _run_pgd_variants(problem, runs)
        _record_comparison(problem, "more-steps-leave-more", weak, more_steps)
        _record_comparison(problem, "more-restarts-leave-more", weak, torch.stack(restarts).any(0))
        _record_comparison(problem, "larger-eps-leaves-more", weak, larger_eps)


def _run_pgd_variants(problem: Problem, runs: Sequence[RunSpec]) -> list[Tensor]:
    """Which examples each run solves, (M,) bool each; successes within the budget of the problem are kept."""
    rows, start = torch.cat([run.rows for run in runs]), torch.cat([run.start for run in runs])
    eps = torch.cat([run.eps for run in runs])
    steps = torch.cat([torch.full_like(run.rows, run.steps) for run in runs])
    cases = problem.subproblem(rows, threat=replace(problem.threat, eps=eps))
    lengths = _REACH / steps * torch.as_tensor(cases.threat.budget, dtype=torch.float64, device=eps.device)
    x_adv, best, first_loss = _pgd(cases, start, lengths, steps)
    solved = cases.reliably_reached(x_adv)
    longest = (steps == steps.max()).nonzero().squeeze(1)
    if len(problem.views) > 1 or problem.views[0] != "exact":
        _check_view(cases[longest], x_adv[longest], solved[longest], problem)
    _check_convergence(cases[longest], best[longest], first_loss[longest], lengths[longest] / 2, problem)
    problem.charge(rows, cases)
    in_budget = eps <= _budgets(problem[rows])
    kept = (solved & in_budget).nonzero().squeeze(1)
    if len(kept) and not problem.stochastic:
        problem[rows[kept]].success(cases.best[kept])
    return list(torch.split(solved, [len(run.rows) for run in runs]))


def _pgd(problem: Problem, x_adv: Tensor, lengths: Tensor, steps: Tensor) -> tuple[Tensor, BestPoint, Tensor]:
    """PGD with a step size and a number of steps per case; solved cases stop.

    Args:
        problem: The cases.
        x_adv: The first points, (N, *S).
        lengths: The step sizes in input units, (N,).
        steps: The numbers of steps, (N,).

    Returns:
        The last points, (N, *S), the best ones, and the losses at the first ones, (N,).
    """
    x, threat, best = problem.x, problem.threat, BestPoint(x_adv)
    first_loss: list[Tensor] = []

    def active(step: int) -> Tensor:
        return (steps > step) & (problem.unsolved if problem.early_stop else steps > 0)

    def update(step: int, x_adv: Tensor, grad: Tensor) -> Tensor:
        return threat.project(threat.move(-grad, x_adv, x, lengths), x)

    def observe(x_adv: Tensor, loss: Tensor) -> None:
        if not first_loss:
            first_loss.append(loss)
        best.update(x_adv, loss)
        best.loss = torch.where(loss.isnan(), loss, best.loss)  # no progress is measured after an undefined loss

    x_last = gradient_descent(problem, x_adv, range(int(steps.max())), update, observe, active)
    return x_last, best, first_loss[0] if first_loss else best.loss


def _check_convergence(cases: Problem, best: BestPoint, first_loss: Tensor, lengths: Tensor, problem: Problem) -> None:
    """Record for how many unsolved cases half the step size lowers the loss markedly further from the best point.

    Source: Pintor et al. 2022, "Indicators of attack failure", the indicator of an incomplete optimisation
        (https://arxiv.org/abs/2106.09947). There the slope of the loss at the end of the run is tested; here the run is
        continued.
    """
    unsolved = cases.unsolved.nonzero().squeeze(1)
    if not len(unsolved) or cases.stochastic:
        return
    active, before, decrease = cases[unsolved], best.loss[unsolved], (first_loss - best.loss)[unsolved]
    after = _pgd(active, best.x_adv[unsolved], lengths[unsolved], torch.full_like(unsolved, _FEW_STEPS))[1].loss
    hits = ~active.unsolved | (before - after > _PROGRESS * decrease)
    problem.record_check("plateau", hits.sum(), len(unsolved))


def _check_view(cases: Problem, x_adv: Tensor, solved: Tensor, problem: Problem) -> None:
    """Record how many of the points that reach the goal in the adversary's view do not reach it on the deployed function.

    Source: Pintor et al. 2022, the indicator of a transfer failure.
    """
    reached_in_view = cases.goal.success(cases.predict_and_vjp(x_adv)[0], cases.ref)
    problem.record_check("view-misleads", (reached_in_view & ~solved).sum(), int(reached_in_view.sum()))


def _record_comparison(problem: Problem, name: str, weak: Tensor, strong: Tensor) -> None:
    """Record how many of the examples on which two attacks differ only the weak one solved, (N,) bool each."""
    problem.record_check(name, (weak & ~strong).sum(), int((weak != strong).sum()))


def check_unbounded(problem: Problem, rows: Tensor) -> None:
    """Check whether examples withstand iterative FGSM from x whose budget is the whole box.

    With K classes, at most one example in K may be right by chance. Without a budget the norm affects only the path of the
    attack. Linf is used, because plain gradient steps get stuck even on sound models.
    """
    if not len(rows) or problem.threat.bounds is None:
        return
    low, high = problem.threat.bounds
    unbounded = problem.subproblem(rows, threat=Linf(high - low, problem.threat.bounds))
    classes = 1 + len(problem.goal.parts(unbounded.predict(unbounded.x), unbounded.ref))
    robust = ~unbounded.reliably_reached(PGD(steps=_UNBOUNDED_STEPS, random_start=False).run(unbounded))
    problem.charge(rows, unbounded)
    problem.record_check("unbounded-leaves-robust", robust.sum(), len(rows), 1 / max(2, classes))


def check_gradient_free(problem: Problem, share: float) -> None:
    """Attack the unsolved examples without gradients of the model: random tiles, scores, decisions for a share, transfer."""
    rows = problem.unsolved.nonzero().squeeze(1)
    if problem.stochastic or not len(rows):
        return
    substitute = train_substitute(problem, _SUBSTITUTE)
    for attack, attack_share in ((Square(queries=_SCORE_QUERIES), 1.0), (RayS(queries=_DECISION_QUERIES), share)):
        examples = problem[sample_rows(problem, repr(attack), attack_share)]
        if attack.supports(problem.threat) and len(examples):
            examples.success(attack.run(examples))
    problem.record_check("gradient-free-breaks", (~problem.unsolved[rows]).sum(), len(rows), 0.01)
    rows = problem.unsolved.nonzero().squeeze(1)
    if substitute is not None and len(rows):
        for _ in transfer_attack(problem, substitute, _SUBSTITUTE):
            pass
        problem.record_check("transfer-breaks", (~problem.unsolved[rows]).sum(), len(rows), 0.01)


@final
@dataclass(frozen=True, repr=False)
class BeyondHyperplane(Goal):
    """Features on the positive side of a hyperplane. `ref`: its normal vector and its offset, (N, D + 1)."""

    def loss(self, out: Any, ref: Tensor) -> Tensor:
        """The negative score of the hyperplane, (N,)."""
        return -((flatten_rows(out) * ref[:, :-1].to(out)).sum(1) + ref[:, -1].to(out))

    def success(self, out: Any, ref: Tensor) -> Tensor:
        """Whether the score is positive, (N,) bool."""
        return self.loss(out, ref) < 0


def check_binarised(problem: Problem, rows: Tensor) -> None:
    """Check whether a descent finds adversarial examples that exist by construction; needs the features of the target.

    For each example a hyperplane separates the features of points inside the ball from those of one point on its surface.
    This point is an adversarial example of the model whose last layer is the hyperplane; an attack that finds none is too
    weak for these features.

    Source: Zimmermann, Brendel, Tramer & Carlini 2022, "Increasing confidence in adversarial robustness evaluations",
        algorithm 1 (https://arxiv.org/abs/2206.13991). There the last layer is trained; here it is Fisher's linear
        discriminant, in closed form, halfway between the outer point and the nearest inner one.
    """
    features = problem.features
    if features is None or problem.stochastic or not len(rows):
        return
    examples = problem[rows]
    no_plane = examples.x.new_zeros(len(rows), 2)
    sampled = problem.subproblem(rows, keep="last", fn=features, goal=BeyondHyperplane(), ref=no_plane)
    clean = sampled.predict(examples.x)
    if not isinstance(clean, Tensor):
        return
    points = [examples.x + _INNER_SHARE * (examples.start(4000 + draw) - examples.x) for draw in range(_INNER)]
    inner = torch.stack([flatten_rows(clean), *(flatten_rows(sampled.predict(point)) for point in points)], 1).double()
    surface = (random_tiles(examples, 4000 + draw) for draw in range(_OUTER))
    outer = torch.stack([flatten_rows(sampled.predict(point)) for point in surface], 1).double()
    problem.charge(rows, sampled)
    planes, separable = _separate(inner.detach(), outer.detach())
    kept = separable.nonzero().squeeze(1)
    if not len(kept):
        return
    cases = problem.subproblem(rows[kept], fn=features, goal=BeyondHyperplane(), ref=planes[kept])
    cases.success(descend(cases, cases.start(4000 + _INNER), _MANY_STEPS))
    problem.charge(rows[kept], cases)
    problem.record_check("binarisation-missed", cases.unsolved.sum(), len(kept), _MISSED_LIMIT)


def _separate(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Hyperplanes between the inner points, (N, M, D), and that outer point, (N, L, D), which has the widest gap to them.

    The normal vector is Fisher's, (S + r I)^-1 (o - m), with the mean m and the covariance S of the inner points; it is
    computed from an M x M system instead of the D x D one (Woodbury identity). It is scaled so that the outer point has score
    1 and the nearest inner point -1.

    Returns:
        The hyperplanes, (N, D + 1), and which examples are separable, (N,) bool.
    """
    count, size = inner.shape[1:]
    mean = inner.mean(1, keepdim=True)
    centred, difference = inner - mean, outer - mean
    ridge = (_RIDGE * centred.square().sum((1, 2)) / (count * size)).clamp(min=1e-12)[:, None, None]
    system = centred @ centred.mT + count * ridge * torch.eye(count, dtype=inner.dtype, device=inner.device)
    normal = (difference - (torch.linalg.solve(system, centred @ difference.mT)).mT @ centred) / ridge  # (N, L, D)
    inner_score, outer_score = (inner @ normal.mT).amax(1), (outer * normal).sum(2)  # (N, L) each
    gap, widest = ((outer_score - inner_score) / normal.norm(dim=2).clamp(min=1e-300)).max(1)
    index = widest[:, None]
    inner_score, outer_score = inner_score.gather(1, index), outer_score.gather(1, index)
    normal = normal[torch.arange(len(normal), device=normal.device), widest]
    scale = 2 / (outer_score - inner_score).clamp(min=1e-300)
    planes = torch.cat([normal * scale, -(inner_score + outer_score) / 2 * scale], 1)
    return planes, (gap > 0) & planes.isfinite().all(1)


def _budgets(problem: Problem, threat: Threat | None = None) -> Tensor:
    """The budget of each example, (N,) float64, under the threat of the problem or another one."""
    eps = torch.as_tensor((threat or problem.threat).eps, dtype=torch.float64)
    return eps.to(problem.x.device).expand(len(problem))
