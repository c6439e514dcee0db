"""FAB against a loop by hand, and where it sees what descents do not."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustkit import L2, PGD, ClassifyAs, Linf, Misclassify, data, zoo
from robustkit.attack import Attack
from robustkit.attacks import FAB
from robustkit.attacks._boundary import DecisionBoundary
from robustkit.attacks.fab import boundary_walk
from robustkit.errors import ArgumentError
from robustkit.losses import margin

torch.manual_seed(0)
NET = nn.Sequential(nn.Flatten(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)).double().eval()
X = 0.3 + 0.4 * torch.rand(7, 10, dtype=torch.float64)
Y = NET(X).argmax(1)


def projected(norm, x, grad, value):
    """Onto the plane, without a box."""
    if norm is L2:
        return -value[:, None] * grad / grad.square().sum(1, keepdim=True)
    return -value[:, None] * grad.sign() / grad.abs().sum(1, keepdim=True)


def by_hand(norm, steps, rank, bias=0.1, overshoot=1.05, pull=0.7):
    """The smallest changes over a walk along the border to the class of one rank, (N,), infinite where there is none."""
    wanted = NET(X).scatter(1, Y[:, None], -torch.inf).argsort(1, descending=True)[:, rank]
    length = (lambda v: v.norm(dim=1)) if norm is L2 else (lambda v: v.abs().amax(1))
    at, smallest = X, torch.full((len(X),), torch.inf, dtype=torch.float64)
    for _ in range(steps):
        at = at.detach().requires_grad_()
        out = NET(at)
        ahead = out.scatter(1, wanted[:, None], -torch.inf).amax(1) - out.gather(1, wanted[:, None])[:, 0]
        (grad,) = torch.autograd.grad(ahead.sum(), at)
        at, ahead = at.detach(), ahead.detach()
        reached = ahead < 0
        smallest = torch.where(reached, torch.minimum(smallest, length(at - X)), smallest)
        back = torch.where(reached[:, None], X + pull * (at - X), at)
        one = projected(norm, back, grad, ahead + (grad * (back - at)).sum(1))
        two = projected(norm, X, grad, ahead + (grad * (X - at)).sum(1))
        share = (length(one) / (length(one) + length(two))).clamp(max=bias)[:, None]
        at = (1 - share) * (back + overshoot * one) + share * (X + overshoot * two)
    return smallest


@pytest.mark.parametrize("norm", [Linf, L2])
@pytest.mark.parametrize(("steps", "parts"), [(6, 1), (9, 2)])
def test_it_is_the_loop_by_hand(norm, steps, parts):
    found = torch.stack([by_hand(norm, steps, rank) for rank in range(parts)]).amin(0)
    assert found.isfinite().sum() >= 4
    result = FAB(steps=steps, parts=parts)(NET, X, Y, threat=norm(5.0, bounds=None), keep="smallest")
    assert torch.equal(result.success, found.isfinite())
    torch.testing.assert_close(result.size[result.success], found[result.success], rtol=1e-6, atol=1e-9)
    assert (result.backwards == steps * parts).all()


def test_walks_leave_the_budget_and_come_back():
    """The budget only says what counts: a quarter of it changes nothing of the way."""
    far = FAB(steps=15, parts=1)(NET, X, Y, threat=L2(5.0, bounds=None), keep="smallest")
    eps = float(far.size[far.success].median())
    near = FAB(steps=15, parts=1)(NET, X, Y, threat=L2(eps, bounds=None), keep="smallest")
    assert torch.equal(near.success, far.success & (far.size <= eps))
    assert 0 < near.success.sum() < far.success.sum()
    torch.testing.assert_close(near.size[near.success], far.size[near.success])


def test_where_a_net_is_flat_around_x_the_border_shows_the_way():
    """A net with thresholds, trained against Linf, in L2: a shortest walk leaves less than half of what PGD leaves.

    By pyautoattack 0.2.0 (standard, seed 0) 3 of these 40 are robust.
    """
    part, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn-robust")
    left = [
        int((~attack(net, part.x, part.y, goal=Misclassify(margin), threat=L2(2.0)).success).sum())
        for attack in (PGD(steps=90), FAB(steps=30, parts=3))
    ]
    assert left[0] >= 25
    assert left[1] <= left[0] / 2


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"parts": 0}, {"bias": -0.1}, {"bias": 1.5}, {"pull": 1.0}, {"pull": 0.0}, {"overshoot": 0.9}]
)
def test_senseless_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        FAB(**fields)


def test_a_walk_is_the_same_alone_and_beside_others_who_leave():
    """Half of them are solved on the way, so that the rest walks on without them."""
    x = 0.3 + 0.4 * torch.rand(30, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    eps = torch.where(torch.arange(30) % 2 == 0, 5.0, 1e-3).double()
    found = []

    @dataclass(frozen=True)
    class Walk(Attack):
        def run(self, problem):
            wanted = NET(problem.x).argsort(1, descending=True)[:, 1]
            asked = problem.with_surrogate(DecisionBoundary(ClassifyAs().with_surrogate(margin)), wanted)
            found.append((*boundary_walk(asked, 12, FAB()), (~problem.unsolved).tolist()))
            return problem.x

    y = NET(x).argmax(1)
    Walk()(NET, x, y, threat=L2(eps, bounds=None))
    (points, size, solved), found = found[0], []
    for row in range(30):
        Walk()(NET, x[row : row + 1], y[row : row + 1], threat=L2(eps[row : row + 1], bounds=None))
    assert 8 <= sum(solved) <= 15
    assert size.isfinite().sum() > sum(solved)
    torch.testing.assert_close(points, torch.cat([one for one, _, _ in found]))
    torch.testing.assert_close(size, torch.cat([one for _, one, _ in found]))
    assert solved == [one for _, _, (one,) in found]
