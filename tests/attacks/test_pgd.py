import pytest
import torch
from torch import nn

from robustkit import L1, L2, PGD, ClassifyAs, Linf, Pixels
from robustkit._engine.noise import Noise
from robustkit.errors import ArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
X = torch.rand(9, 1, 8, 8)
Y = NET(X).argmax(1)


def by_hand(start, steps, step, sign, y):
    """Madry et al., eq. 4, with nothing of the package in it."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = nn.functional.cross_entropy(NET(x_adv), y, reduction="sum")
        x_adv = x_adv + sign * step * torch.autograd.grad(loss, x_adv)[0].sign()
        x_adv = (X + (x_adv - X).clamp(-0.1, 0.1)).clamp(0, 1)
    return x_adv.detach()


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_is_the_loop_of_the_paper(random_start):
    start = Linf(0.1).sample(X, Noise(4, torch.arange(9)).at("start", 0)) if random_start else X
    ours = PGD(steps=7, reach=1.4, random_start=random_start)(NET, X, Y, threat=Linf(0.1), seed=4, keep="last")
    assert torch.equal(ours.x_adv, by_hand(start, 7, 1.4 / 7 * 0.1, +1, Y))


def test_targeted_pgd_descends_towards_the_wanted_class():
    wanted = (Y + 1) % 3
    ours = PGD(steps=7, step_size=0.03, random_start=False)(NET, X, wanted, goal=ClassifyAs(), threat=Linf(0.1), keep="last")
    assert torch.equal(ours.x_adv, by_hand(X, 7, 0.03, -1, wanted))


def test_first_success_of_the_loop_comes_back_under_first():
    ours = PGD(steps=7, step_size=0.03, random_start=False)(NET, X, Y, threat=Linf(0.1))
    for i in ours.success.nonzero().flatten().tolist():
        path = (by_hand(X, k, 0.03, +1, Y)[i : i + 1] for k in range(8))
        first = next(x_adv for x_adv in path if NET(x_adv).argmax(1) != Y[i])
        torch.testing.assert_close(ours.x_adv[i : i + 1], first)
    assert ours.success.any()


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.4), L1(2.0), Pixels(2)])
def test_more_budget_never_hurts_the_loss(threat):
    """Not a theorem for a net, but for this convex one: logits affine in x on each side, so PGD from x must lower the loss."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    y = net(X).argmax(1)
    before = nn.functional.cross_entropy(net(X), y, reduction="none")
    result = PGD(steps=20, random_start=False)(net, X, y, threat=threat, keep="best")
    after = nn.functional.cross_entropy(net(result.x_adv), y, reduction="none")
    assert (after > before).all()


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"steps": 2.5}, {"steps": True}, {"reach": 0}, {"step_size": -0.1}, {"reach": "far"}]
)
def test_senseless_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        PGD(**fields)
