"""The laws of a threat: what every set of allowed changes must obey."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import dot, norm
from robustkit.testing._runs import holds
from robustkit.testing.hyperplane import Halfspace, Hyperplane
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["ThreatCase", "check_threat"]


@final
@dataclass(frozen=True)
class ThreatCase:
    """A threat, images x, two other points of the same shape (anywhere), and a gradient."""

    threat: Threat
    x: Tensor
    one: Tensor
    other: Tensor
    grad: Tensor

    @property
    def tolerance(self) -> Tensor:
        """What rounding may add to a size, (N,) float64."""
        return 2 * self.threat.slack(self.x) + 1e-12


def check_threat(*kinds: type[Threat], budgets: Any = None, examples: int | None = None) -> int:  # Any: a strategy
    """Check the laws on generated images, gradients and budgets.

    Args:
        kinds: Which threats; default the four of this package.
        budgets: A hypothesis strategy of eps, for threats of your own.
        examples: Cases for each law and threat; default that of the active hypothesis profile.

    Returns:
        How many cases were run.

    Raises:
        AssertionError: A law does not hold; hypothesis shows the smallest case.
    """
    total = 0
    for kind in kinds or (Linf, L2, L1, Pixels):
        total += sum(holds(law, kind, _cases(kind, budgets), examples) for law in LAWS)
    return total


def size_is_zero_only_without_a_change(kind: type[Threat], case: ThreatCase) -> None:
    """size(x, x) = 0, and any other point is larger."""
    assert (case.threat.size(case.x, case.x) == 0).all()
    changed = (case.one != case.x).flatten(1).any(1)
    assert torch.equal(case.threat.size(case.one, case.x) > 0, changed)


def project_lands_inside(kind: type[Threat], case: ThreatCase) -> None:
    """Every projection is contained: in the box exactly, in the ball but for rounding."""
    assert case.threat.contains(case.threat.project(case.one, case.x), case.x).all()


def project_is_idempotent(kind: type[Threat], case: ThreatCase) -> None:
    """A projected point stays where it is, but for rounding."""
    once = case.threat.project(case.one, case.x)
    again = case.threat.project(once, case.x)
    assert ((again - once).double().abs().flatten(1).amax(1) <= case.tolerance).all()


def project_leaves_points_inside_alone(kind: type[Threat], case: ThreatCase) -> None:
    """Shrunk far enough into the threat, a point is its own projection, but for rounding."""
    inside = case.threat.sample(case.x, Noise(0, torch.arange(len(case.x))))
    moved = (case.threat.project(inside, case.x) - inside).double().abs().flatten(1).amax(1)
    assert (moved <= case.tolerance).all()


def project_is_not_expansive(kind: type[Threat], case: ThreatCase) -> None:
    """Two points come no further apart, where the projection is onto a convex set and exact (Linf, L1)."""
    if isinstance(case.threat, Linf | L1):
        before = norm((case.one - case.other).double(), 2)
        a, b = (case.threat.project(point, case.x).double() for point in (case.one, case.other))
        assert (norm(a - b, 2) <= before + case.tolerance * a[0].numel() ** 0.5).all()


def samples_lie_inside(kind: type[Threat], case: ThreatCase) -> None:
    """Random points are contained, and belong to the example: one example alone draws the same."""
    ids = torch.arange(len(case.x)) + 7
    sample = case.threat.sample(case.x, Noise(3, ids))
    assert case.threat.contains(sample, case.x).all()
    last = case.threat[-1:].sample(case.x[-1:], Noise(3, ids[-1:]))
    assert torch.equal(last, sample[-1:])


def steepest_reaches_the_best_gain(kind: type[Threat], case: ThreatCase) -> None:
    """It lies inside and no point of ball and box together gains more (closed forms, one example at a time).

    For threats other than the four, whose best gain is not known here, the first half alone.
    """
    steepest = case.threat.steepest(case.grad, case.x)
    assert case.threat.contains(steepest, case.x).all()
    if not isinstance(case.threat, Linf | L2 | L1 | Pixels):
        return
    gain = dot(case.grad.double(), (steepest - case.x).double())
    best = torch.stack([_best(g, x[None], case.threat) for g, x in zip(case.grad.double(), case.x.double(), strict=True)])
    scale = norm(case.grad, 1)
    assert ((gain - best).abs() <= 1e-5 * best + scale * case.tolerance).all()


def step_gains(kind: type[Threat], case: ThreatCase) -> None:
    """A step and its projection never lose on the linear function, from any point inside, on the edge of the box too."""
    x_adv = case.threat.project(case.one, case.x)
    moved = case.threat.step(case.grad, x_adv, case.x, 0.1)
    inside_box = case.threat.clamp(moved)
    gain = dot(case.grad.double(), (inside_box - x_adv).double())
    rounding = norm(case.grad, 1) * case.tolerance
    assert (gain >= -rounding).all()
    if isinstance(case.threat, L1 | Pixels):
        room = case.threat._room_in_box(case.grad, x_adv) > 1e-3
        movable = ((case.grad.flatten(1) != 0) & room).any(1)
        assert ((gain > 0) | ~movable | (gain.abs() <= rounding)).all()


def one_budget_an_example(kind: type[Threat], case: ThreatCase) -> None:
    """Budgets of one number an example give what separate calls give."""
    n = len(case.x)
    eps = torch.full((n,), float(case.threat.eps), dtype=torch.float64)
    eps[0] = eps[0] if isinstance(case.threat, Pixels) else eps[0] / 2
    whole = replace(case.threat, eps=eps)
    for method in (whole.project(case.one, case.x), whole.steepest(case.grad, case.x)):
        assert whole.contains(method, case.x).all()
    alone = replace(case.threat, eps=float(eps[0])) if not isinstance(case.threat, Pixels) else case.threat
    difference = whole.project(case.one, case.x)[:1] - alone.project(case.one[:1], case.x[:1])
    assert (difference.abs().flatten(1).amax(1).double() <= case.tolerance[:1]).all()


LAWS = (
    size_is_zero_only_without_a_change,
    project_lands_inside,
    project_is_idempotent,
    project_leaves_points_inside_alone,
    project_is_not_expansive,
    samples_lie_inside,
    steepest_reaches_the_best_gain,
    step_gains,
    one_budget_an_example,
)


def _best(grad: Tensor, x: Tensor, threat: Threat) -> Tensor:
    return Hyperplane(Halfspace(grad, 0.0), x, torch.zeros(1, dtype=torch.int64)).best_gain(threat)[0]


def _cases(kind: type[Threat], budgets: Any = None) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    from robustkit.testing.strategies import gradients, images, shapes, threats

    def of_shape(shape: tuple[int, int, int, int]) -> Any:
        elsewhere = st.one_of(gradients(shape).map(lambda g: g.clamp(-1e3, 1e3)), images(shape))
        of_kind = st.booleans().flatmap(lambda bounded: threats([kind], bounded=bounded or kind is Pixels, budgets=budgets))
        return st.builds(ThreatCase, of_kind, images(shape), elsewhere, elsewhere, gradients(shape))

    return shapes().flatmap(of_shape)
