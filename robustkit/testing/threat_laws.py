"""The laws that every threat must obey."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from robustkit._engine.noise import Noise
from robustkit._engine.tensors import dot, norm
from robustkit.testing._check_law import check_law
from robustkit.testing.hyperplane import Halfspace, Hyperplane
from robustkit.threats import L1, L2, Linf, Pixels, Threat

__all__ = ["ThreatCase", "check_threat"]


@final
@dataclass(frozen=True)
class ThreatCase:
    """A threat, images x, two arbitrary points of the same shape, and a gradient."""

    threat: Threat
    x: Tensor
    one: Tensor
    other: Tensor
    grad: Tensor

    @property
    def tolerance(self) -> Tensor:
        """The rounding error of a size, (N,) float64."""
        return 2 * self.threat.slack(self.x) + 1e-12


def check_threat(*kinds: type[Threat], budgets: Any = None, examples: int | None = None) -> int:  # Any: a strategy
    """Check the laws on generated images, gradients and budgets.

    Args:
        kinds: The threat classes; default the four of this package.
        budgets: A hypothesis strategy of eps, for your own threats.
        examples: Number of cases per law and threat; default that of the active hypothesis profile.

    Returns:
        The number of cases.

    Raises:
        AssertionError: A law is violated; hypothesis shows the smallest case.
        ArgumentError: A threat of your own without `budgets`.
        MissingExtraError: hypothesis is not installed.
    """
    total = 0
    for kind in kinds or (Linf, L2, L1, Pixels):
        total += sum(check_law(law, kind, _cases(kind, budgets), examples) for law in LAWS)
    return total


def size_is_zero_only_at_x(kind: type[Threat], case: ThreatCase) -> None:
    """size(x, x) = 0, and the size of any other point is positive."""
    assert (case.threat.size(case.x, case.x) == 0).all()
    differs = (case.one != case.x).flatten(1).any(1)
    assert torch.equal(case.threat.size(case.one, case.x) > 0, differs)


def projection_is_inside_the_threat(kind: type[Threat], case: ThreatCase) -> None:
    """Every projection is inside the box exactly, and inside the ball up to rounding."""
    assert case.threat.contains(case.threat.project(case.one, case.x), case.x).all()


def projection_is_idempotent(kind: type[Threat], case: ThreatCase) -> None:
    """Projecting twice gives the same point as projecting once, up to rounding."""
    once = case.threat.project(case.one, case.x)
    again = case.threat.project(once, case.x)
    assert ((again - once).double().abs().flatten(1).amax(1) <= case.tolerance).all()


def projection_does_not_move_inside_points(kind: type[Threat], case: ThreatCase) -> None:
    """A point inside the threat is its own projection, up to rounding."""
    inside = case.threat.sample(case.x, Noise(0, torch.arange(len(case.x))))
    moved = (case.threat.project(inside, case.x) - inside).double().abs().flatten(1).amax(1)
    assert (moved <= case.tolerance).all()


def projection_is_non_expansive(kind: type[Threat], case: ThreatCase) -> None:
    """Projection does not increase the distance of two points, where it is exact and onto a convex set (Linf, L1)."""
    if isinstance(case.threat, Linf | L1):
        before = norm((case.one - case.other).double(), 2)
        a, b = (case.threat.project(point, case.x).double() for point in (case.one, case.other))
        assert (norm(a - b, 2) <= before + case.tolerance * a[0].numel() ** 0.5).all()


def samples_are_inside_and_per_example(kind: type[Threat], case: ThreatCase) -> None:
    """Random points are inside the threat, and an example alone gets the same point."""
    ids = torch.arange(len(case.x)) + 7
    sample = case.threat.sample(case.x, Noise(3, ids))
    assert case.threat.contains(sample, case.x).all()
    last = case.threat[-1:].sample(case.x[-1:], Noise(3, ids[-1:]))
    assert torch.equal(last, sample[-1:])


def steepest_maximises_a_linear_function(kind: type[Threat], case: ThreatCase) -> None:
    """It is inside the threat, and no point in ball and box has a larger value (closed forms, per example).

    For your own threats the best value is not known, and only the first part is checked.
    """
    steepest = case.threat.steepest(case.grad, case.x)
    assert case.threat.contains(steepest, case.x).all()
    if not isinstance(case.threat, Linf | L2 | L1 | Pixels):
        return
    gain = dot(case.grad.double(), (steepest - case.x).double())
    best = torch.stack([_best_gain(g, x[None], case.threat) for g, x in zip(case.grad.double(), case.x.double(), strict=True)])
    scale = norm(case.grad, 1)
    assert ((gain - best).abs() <= 1e-5 * best + scale * case.tolerance).all()


def step_does_not_decrease_a_linear_function(kind: type[Threat], case: ThreatCase) -> None:
    """A step from any point inside, clamped to the box, does not decrease the linear function."""
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


def eps_may_differ_per_example(kind: type[Threat], case: ThreatCase) -> None:
    """With one eps per example, results are those of separate calls."""
    n = len(case.x)
    eps = torch.full((n,), float(case.threat.eps), dtype=torch.float64)
    eps[0] = eps[0] if isinstance(case.threat, Pixels) else eps[0] / 2
    batch_threat = replace(case.threat, eps=eps)
    for x_adv in (batch_threat.project(case.one, case.x), batch_threat.steepest(case.grad, case.x)):
        assert batch_threat.contains(x_adv, case.x).all()
    first_threat = replace(case.threat, eps=float(eps[0])) if not isinstance(case.threat, Pixels) else case.threat
    difference = batch_threat.project(case.one, case.x)[:1] - first_threat.project(case.one[:1], case.x[:1])
    assert (difference.abs().flatten(1).amax(1).double() <= case.tolerance[:1]).all()


LAWS = (
    size_is_zero_only_at_x,
    projection_is_inside_the_threat,
    projection_is_idempotent,
    projection_does_not_move_inside_points,
    projection_is_non_expansive,
    samples_are_inside_and_per_example,
    steepest_maximises_a_linear_function,
    step_does_not_decrease_a_linear_function,
    eps_may_differ_per_example,
)


def _best_gain(grad: Tensor, x: Tensor, threat: Threat) -> Tensor:
    return Hyperplane(Halfspace(grad, 0.0), x, torch.zeros(1, dtype=torch.int64)).best_gain(threat)[0]


def _cases(kind: type[Threat], budgets: Any = None) -> Any:  # Any: hypothesis is an extra
    from hypothesis import strategies as st

    from robustkit.testing.strategies import gradients, images, shapes, threats

    def of_shape(shape: tuple[int, int, int, int]) -> Any:
        points = st.one_of(gradients(shape).map(lambda g: g.clamp(-1e3, 1e3)), images(shape))
        threat = st.booleans().flatmap(lambda bounded: threats([kind], bounded=bounded or kind is Pixels, budgets=budgets))
        return st.builds(ThreatCase, threat, images(shape), points, points, gradients(shape))

    return shapes().flatmap(of_shape)
