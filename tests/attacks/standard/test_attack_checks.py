"""The checks of the audit that run attacks, on models for which the outcome is known."""

import pytest
import torch
from small_problems import (
    EPS,
    FLIPPED,
    SOUND,
    N,
    X,
    Y,
    all_rows,
    audit_flags,
    check_counts,
    check_monotonicity,
    check_unbounded,
    names,
    run_inside,
)
from torch import nn

from robustkit import L1, L2, Linf, Pixels, Target
from robustkit.attacks._max_threat import max_threat
from robustkit.attacks.standard import attack_checks
from robustkit.attacks.standard.audit import Audit

# Weak and strong attacks.


def zigzag(x):
    """A function of one pixel: up for 0.7 of a period, down for 0.3, repeated; the highest point is at the end of the budget.

    A step of a five-step PGD run is one period, so it meets the same slope each time and reaches the end; a step of a
    twenty-step run is a quarter of a period, too short to cross the descending part. Class 1 wins on the last peak only.
    """
    period = 0.5 * EPS
    t = (x[:, 0, 0, 0] - 0.5 - EPS) / period + 0.7
    whole = t.detach().floor()
    fraction = t - whole
    height = 0.4 * whole + torch.where(fraction < 0.7, fraction, 1.4 - fraction)
    return torch.stack([torch.full_like(height, 0.5), height], 1)


def test_a_model_on_which_more_steps_leave_more_robust():
    x = torch.full((N, 1, 4, 4), 0.5)
    result = run_inside(check_monotonicity, zigzag, x=x, y=torch.zeros(N, dtype=torch.int64))
    assert "more-steps-leave-more" in audit_flags(result)
    hits, of = check_counts(result)["more-steps-leave-more"]
    # A random start lies on an ascending part with probability 0.7; twenty steps arrive from the last of four periods only.
    assert 0.3 * N < hits <= of < 0.9 * N


def moat(x):
    """A function of one pixel: class 1 wins just inside the budget; beyond it the score falls, and rises to no use."""
    t = (x[:, 0, 0, 0] - 0.5) / EPS
    up = t - 0.95 - 20 * (t > 1.001)
    return torch.stack([torch.zeros_like(up), up], 1)


def test_a_model_on_which_a_larger_budget_leaves_more_robust():
    """With twice the budget, steps of a whole budget hit the last twentieth of it one time in twenty."""
    x, y = torch.full((N, 1, 4, 4), 0.5), torch.zeros(N, dtype=torch.int64)
    result = run_inside(check_monotonicity, moat, x=x, y=y)
    assert audit_flags(result) == {"larger-eps-leaves-more"}
    hits, of = check_counts(result)["larger-eps-leaves-more"]
    assert 0.8 * N < hits == of <= N
    sound = run_inside(check_monotonicity, threat=Linf(0.3))
    assert audit_flags(sound) == set()
    assert check_counts(sound)["more-restarts-leave-more"][0] <= 3


def test_only_examples_on_which_two_attacks_differ_are_counted():
    weak = torch.tensor([True, True, False, False, True])
    strong = torch.tensor([True, False, True, False, False])
    result = run_inside(lambda p: attack_checks._record_comparison(p, "more-restarts-leave-more", weak, strong))
    assert check_counts(result) == {"more-restarts-leave-more": (2, 3)}


def test_successes_of_a_check_count_for_the_run():
    """The runs of the check are independent of the attack, but their successes are kept."""
    result = run_inside(check_monotonicity, threat=Linf(0.3))
    assert result.success.any()
    assert Linf(0.3).contains(result.x_adv, X).all()
    assert (SOUND(result.x_adv).argmax(1) != Y)[result.success].all()


def test_the_largest_threat_contains_the_whole_box():
    zero, one = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    for threat in (Linf(0.1), L2(0.1), L1(0.1), Pixels(1)):
        largest = max_threat(threat, zero)
        assert largest.contains(one, zero).all()
        torch.testing.assert_close(largest.size(one, zero), torch.full((2,), float(largest.eps), dtype=torch.float64))
    wide = max_threat(Linf(0.1, bounds=(-1.0, 3.0)), zero)
    assert wide.eps == 4.0
    assert wide.bounds == (-1.0, 3.0)


def test_a_sound_model_is_not_robust_without_a_budget():
    for threat in (Linf(EPS), L2(0.3), L1(0.5), Pixels(2)):
        hits, of = check_counts(run_inside(check_unbounded, threat=threat))["unbounded-leaves-robust"]
        assert of == N
        assert hits <= 3


# Convergence.


def ramp(x, slope):
    """A linear function of one pixel: PGD ends at the limit of the budget, and half the step size changes nothing."""
    up = slope * x[:, 0, 0, 0]
    return torch.stack([torch.full_like(up, 10.0), up], 1)


def valley(x):
    """A function of one pixel whose minimum is overshot again and again by steps of an eighth of a budget."""
    distance = (x[:, 0, 0, 0] - 0.5 - EPS / 32).abs()
    return torch.stack([torch.full_like(distance, 10.0), -20 * distance], 1)


def test_half_the_step_size_helps_where_steps_overshoot_and_not_at_the_limit_of_the_budget():
    x, y = torch.full((N, 1, 4, 4), 0.5), torch.zeros(N, dtype=torch.int64)
    assert check_counts(run_inside(check_monotonicity, lambda x: ramp(x, 1.0), x=x, y=y))["plateau"] == (0, N)
    hits, of = check_counts(run_inside(check_monotonicity, valley, x=x, y=y))["plateau"]
    assert of == N
    assert hits > 0


# The binarisation test.


def separate(inner, outer):
    """The hyperplanes, which examples are separable, and the scores of the inner points."""
    planes, separable = attack_checks._separate(inner, outer)
    return planes, separable, (inner @ planes[:, :-1, None]).squeeze(2) + planes[:, -1:]


def test_the_hyperplane_is_fishers_discriminant_with_all_inner_points_on_one_side():
    """Against the D x D system: the nearest inner point has score -1, the outer one 1."""
    generator = torch.Generator().manual_seed(0)
    inner, outer = (torch.randn(5, count, 7, generator=generator, dtype=torch.float64) for count in (4, 3))
    planes, separable, scores = separate(inner, 4 * outer)
    assert separable.all()
    for row in range(5):
        centred = inner[row] - inner[row].mean(0)
        ridge = attack_checks._RIDGE * centred.square().mean()
        matrix = centred.T @ centred / 4 + ridge * torch.eye(7, dtype=torch.float64)
        normals = [torch.linalg.solve(matrix, point - inner[row].mean(0)) for point in 4 * outer[row]]
        pairs = list(zip(4 * outer[row], normals, strict=True))
        gaps = [(float(point @ normal) - float((inner[row] @ normal).amax())) / float(normal.norm()) for point, normal in pairs]
        best = gaps.index(max(gaps))
        cosine = torch.cosine_similarity(normals[best], planes[row, :-1], dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)
        assert float(planes[row, :-1] @ (4 * outer[row, best]) + planes[row, -1]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(scores.amax(1), -torch.ones(5, dtype=torch.float64))


def test_an_outer_point_among_the_inner_ones_is_not_separable():
    inner = torch.tensor([[[-1.0], [1.0]], [[-1.0], [1.0]]], dtype=torch.float64)
    assert separate(inner, torch.tensor([[[0.5]], [[3.0]]], dtype=torch.float64))[1].tolist() == [False, True]


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.5)])
def test_features_with_a_masked_gradient_are_flagged(threat):
    features = nn.Sequential(*list(SOUND)[:3])

    def run_check(model):
        target = Target(SOUND, features=model)
        return run_inside(lambda p: attack_checks.check_binarised(p, all_rows(p)), target, threat=threat)

    hits, of = check_counts(run_check(features))["binarisation-missed"]
    assert of > N / 2
    assert hits == 0
    masked = run_check(lambda x: features(x.detach()))
    assert check_counts(masked)["binarisation-missed"][0] > of / 2
    assert audit_flags(masked) == {"binarisation-missed"}
    assert "binarisation-missed" not in check_counts(Audit()(SOUND, X, Y, threat=threat))


# Views, and transfer.


def test_a_view_that_is_fooled_where_the_model_is_not_is_noted():
    """The view is fooled by any perturbation, the model by none."""
    view = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        view[1].weight.zero_()
        view[1].bias.copy_(torch.tensor([0.0, 0.0, 0.0]))
        view[1].weight[1] = 1.0
        view[1].bias[1] = -1e-3
    y = torch.zeros(N, dtype=torch.int64)
    robust = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        robust[1].weight.mul_(1e-3)
        robust[1].bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    result = run_inside(check_monotonicity, Target(robust, views={"other": view}), y=y)
    assert check_counts(result)["view-misleads"] == (N, N)
    assert "view-misleads" in names(result.notes)
    assert "view-misleads" not in check_counts(run_inside(check_monotonicity, robust, y=y))


def test_a_substitute_breaks_a_model_with_a_flipped_gradient(monkeypatch):
    """Without Square and RayS, all that the training queries do not break is broken by transfer, and recorded as that."""
    monkeypatch.setattr(attack_checks, "Square", Unsupported)
    monkeypatch.setattr(attack_checks, "RayS", Unsupported)
    monkeypatch.setattr(attack_checks, "_SUBSTITUTE", attack_checks.SubstituteConfig(points=6, steps=100))
    result = run_inside(lambda p: attack_checks.check_gradient_free(p, 1.0), FLIPPED, threat=Linf(0.3))
    hits, of = check_counts(result)["transfer-breaks"]
    broken = check_counts(result)["gradient-free-breaks"][0]
    assert of == N - broken
    assert hits > 2
    assert int(result.success.sum()) == hits + broken
    assert (SOUND(result.x_adv).argmax(1) != Y)[result.success].all()


class Unsupported:
    """An attack that supports no threat."""

    def __init__(self, queries):
        pass

    def supports(self, threat):
        return False
