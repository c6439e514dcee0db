"""The attacks of the audit, on models of which it is known who must win."""

import pytest
import torch
from small_problems import EPS, FLIPPED, SOUND, N, X, Y, ask, everyone, names, raised, raw_runs, seen, unbounded
from torch import nn

from robustkit import L1, L2, Linf, Pixels, Target
from robustkit.attacks.standard import attack_checks as trials
from robustkit.attacks.standard.audit import Audit

# Less and more.


def zigzag(x):
    """Of one pixel: up for 0.7 of a period, down for 0.3, and up again, with its highest point at the end of the budget.

    Five steps of PGD are a period each, so they see the same slope again and again and walk to the end; twenty are a quarter of
    one, too short to leap over the way down. Class 1 wins on the last peak alone.
    """
    period = 0.5 * EPS
    t = (x[:, 0, 0, 0] - 0.5 - EPS) / period + 0.7
    whole = t.detach().floor()
    part = t - whole
    height = 0.4 * whole + torch.where(part < 0.7, part, 1.4 - part)
    return torch.stack([torch.full_like(height, 0.5), height], 1)


def test_a_model_on_which_more_steps_leave_more():
    x = torch.full((N, 1, 4, 4), 0.5)
    result = ask(raw_runs, zigzag, x=x, y=torch.zeros(N, dtype=torch.int64))
    assert "more-steps-leave-more" in raised(result)
    hits, of = seen(result)["more-steps-leave-more"]
    # A random start lies on a way up with 0.7; twenty steps arrive from the last of four periods alone.
    assert 0.3 * N < hits <= of < 0.9 * N


def moat(x):
    """Of one pixel: class 1 comes up at the very edge of the budget; beyond it there is a fall, and a way up to nowhere."""
    t = (x[:, 0, 0, 0] - 0.5) / EPS
    up = t - 0.95 - 20 * (t > 1.001)
    return torch.stack([torch.zeros_like(up), up], 1)


def test_a_model_on_which_a_larger_budget_leaves_more():
    """Twice the budget leaps over the edge: steps of a budget each meet the last twentieth of it one time in twenty."""
    x, y = torch.full((N, 1, 4, 4), 0.5), torch.zeros(N, dtype=torch.int64)
    result = ask(raw_runs, moat, x=x, y=y)
    assert raised(result) == {"larger-eps-leaves-more"}
    hits, of = seen(result)["larger-eps-leaves-more"]
    assert 0.8 * N < hits == of <= N
    fine = ask(raw_runs, threat=Linf(0.3))
    assert raised(fine) == set()
    assert seen(fine)["more-restarts-leave-more"][0] <= 3


def test_only_those_that_were_decided_otherwise_are_compared():
    less = torch.tensor([True, True, False, False, True])
    more = torch.tensor([True, False, True, False, False])
    result = ask(lambda p: trials._compare(p, "more-restarts-leave-more", less, more))
    assert seen(result) == {"more-restarts-leave-more": (2, 3)}


def test_what_a_probe_breaks_counts():
    """Raw runs start from nothing, yet their finds are those of the run."""
    result = ask(raw_runs, threat=Linf(0.3))
    assert result.success.any()
    assert Linf(0.3).contains(result.x_adv, X).all()
    assert (SOUND(result.x_adv).argmax(1) != Y)[result.success].all()


def test_without_a_budget_every_point_is_in_reach():
    zero, one = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    for threat in (Linf(0.1), L2(0.1), L1(0.1), Pixels(1)):
        all_of_it = trials.max_threat(threat, zero)
        assert all_of_it.contains(one, zero).all()
        torch.testing.assert_close(all_of_it.size(one, zero), torch.full((2,), float(all_of_it.eps), dtype=torch.float64))
    wide = trials.max_threat(Linf(0.1, bounds=(-1.0, 3.0)), zero)
    assert wide.eps == 4.0
    assert wide.bounds == (-1.0, 3.0)


def test_a_sound_model_withstands_nothing_without_a_budget():
    for threat in (Linf(EPS), L2(0.3), L1(0.5), Pixels(2)):
        hits, of = seen(ask(unbounded, threat=threat))["unbounded-leaves-robust"]
        assert of == N
        assert hits <= 3


# At the end of a run, or on the way.


def ramp(x, slope):
    """Of one pixel: the gradient never changes, so plain steps end at the edge, and half of one changes nothing."""
    up = slope * x[:, 0, 0, 0]
    return torch.stack([torch.full_like(up, 10.0), up], 1)


def dish(x):
    """A dish of one pixel, whose middle plain steps of an eighth of a budget leap over to and fro."""
    far = (x[:, 0, 0, 0] - 0.5 - EPS / 32).abs()
    return torch.stack([torch.full_like(far, 10.0), -20 * far], 1)


def test_half_the_step_brings_more_where_steps_leap_over_the_goal_and_nothing_at_the_edge():
    x, y = torch.full((N, 1, 4, 4), 0.5), torch.zeros(N, dtype=torch.int64)
    assert seen(ask(raw_runs, lambda x: ramp(x, 1.0), x=x, y=y))["plateau"] == (0, N)
    hits, of = seen(ask(raw_runs, dish, x=x, y=y))["plateau"]
    assert of == N
    assert hits > 0


# What is there by construction.


def plane_of(inner, outer):
    planes, apart = trials._planes(inner, outer)
    return planes, apart, (inner @ planes[:, :-1, None]).squeeze(2) + planes[:, -1:]


def test_the_plane_is_fishers_and_has_all_inner_points_on_one_side():
    """The solution of the D x D system, by another way; scores -1 of the nearest inner point and 1 of the outer one."""
    draw = torch.Generator().manual_seed(0)
    inner, outer = (torch.randn(5, count, 7, generator=draw, dtype=torch.float64) for count in (4, 3))
    planes, apart, scores = plane_of(inner, 4 * outer)
    assert apart.all()
    for row in range(5):
        spread = inner[row] - inner[row].mean(0)
        ridge = trials._RIDGE * spread.square().mean()
        matrix = spread.T @ spread / 4 + ridge * torch.eye(7, dtype=torch.float64)
        ways = [torch.linalg.solve(matrix, point - inner[row].mean(0)) for point in 4 * outer[row]]
        ends = [(float(point @ way), float((inner[row] @ way).amax())) for point, way in zip(4 * outer[row], ways, strict=True)]
        gaps = [(far - near) / float(way.norm()) for (far, near), way in zip(ends, ways, strict=True)]
        best = gaps.index(max(gaps))
        cosine = torch.cosine_similarity(ways[best], planes[row, :-1], dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)
        assert float(planes[row, :-1] @ (4 * outer[row, best]) + planes[row, -1]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(scores.amax(1), -torch.ones(5, dtype=torch.float64))


def test_no_plane_where_the_outer_point_lies_among_the_inner_ones():
    inner = torch.tensor([[[-1.0], [1.0]], [[-1.0], [1.0]]], dtype=torch.float64)
    assert plane_of(inner, torch.tensor([[[0.5]], [[3.0]]], dtype=torch.float64))[1].tolist() == [False, True]


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.5)])
def test_features_that_hide_their_gradient_are_found_out(threat):
    features = nn.Sequential(*list(SOUND)[:3])

    def asked(model):
        return ask(lambda p: trials.binarised(p, everyone(p)), Target(SOUND, features=model), threat=threat)

    hits, of = seen(asked(features))["binarisation-missed"]
    assert of > N / 2
    assert hits == 0
    masked = asked(lambda x: features(x.detach()))
    assert seen(masked)["binarisation-missed"][0] > of / 2
    assert raised(masked) == {"binarisation-missed"}
    assert "binarisation-missed" not in seen(Audit()(SOUND, X, Y, threat=threat))


# Views, and transfer.


def test_a_view_that_is_fooled_alone_is_told():
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].bias.copy_(torch.tensor([0.0, 0.0, 0.0]))
        other[1].weight[1] = 1.0
        other[1].bias[1] = -1e-3
    y = torch.zeros(N, dtype=torch.int64)
    firm = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        firm[1].weight.mul_(1e-3)
        firm[1].bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    result = ask(raw_runs, Target(firm, views={"other": other}), y=y)
    assert seen(result)["view-misleads"] == (N, N)
    assert "view-misleads" in names(result.notes)
    assert "view-misleads" not in seen(ask(raw_runs, firm, y=y))


def test_a_copy_breaks_what_a_flipped_gradient_hides(monkeypatch):
    """Searches that start from nothing are left out: what breaks is the copy's, and said to be."""
    monkeypatch.setattr(trials, "Square", Never)
    monkeypatch.setattr(trials, "RayS", Never)
    monkeypatch.setattr(trials, "_COPY", trials.SubstituteConfig(points=6, steps=100))
    result = ask(lambda p: trials.survivors(p, 1.0), FLIPPED, threat=Linf(0.3))
    hits, of = seen(result)["transfer-breaks"]
    broken = seen(result)["gradient-free-breaks"][0]
    assert of == N - broken
    assert hits > 2
    assert int(result.success.sum()) == hits + broken
    assert (SOUND(result.x_adv).argmax(1) != Y)[result.success].all()


class Never:
    """An attack that serves no threat."""

    def __init__(self, queries):
        pass

    def fits(self, threat):
        return False
