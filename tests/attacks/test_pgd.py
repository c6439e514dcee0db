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


def reference_pgd(start, steps, step, sign, y):
    """The iteration of Madry et al., section 2.1, independent of the package."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = nn.functional.cross_entropy(NET(x_adv), y, reduction="sum")
        x_adv = x_adv + sign * step * torch.autograd.grad(loss, x_adv)[0].sign()
        x_adv = (X + (x_adv - X).clamp(-0.1, 0.1)).clamp(0, 1)
    return x_adv.detach()


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_equals_the_loop_of_the_paper(random_start):
    start = Linf(0.1).sample(X, Noise(4, torch.arange(9)).at("start", 0)) if random_start else X
    ours = PGD(steps=7, reach=1.4, random_start=random_start)(NET, X, Y, threat=Linf(0.1), seed=4, keep="last")
    assert torch.equal(ours.x_adv, reference_pgd(start, 7, 1.4 / 7 * 0.1, +1, Y))


def test_targeted_pgd_descends_towards_the_target_class():
    target = (Y + 1) % 3
    ours = PGD(steps=7, step_size=0.03, random_start=False)(NET, X, target, goal=ClassifyAs(), threat=Linf(0.1), keep="last")
    assert torch.equal(ours.x_adv, reference_pgd(X, 7, 0.03, -1, target))


def test_keep_first_returns_the_first_successful_iterate():
    ours = PGD(steps=7, step_size=0.03, random_start=False)(NET, X, Y, threat=Linf(0.1))
    for i in ours.success.nonzero().flatten().tolist():
        iterates = (reference_pgd(X, k, 0.03, +1, Y)[i : i + 1] for k in range(8))
        first = next(x_adv for x_adv in iterates if NET(x_adv).argmax(1) != Y[i])
        torch.testing.assert_close(ours.x_adv[i : i + 1], first)
    assert ours.success.any()


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.4), L1(2.0), Pixels(2)])
def test_the_attack_raises_the_loss_of_a_linear_model(threat):
    """No theorem for networks in general; but the cross-entropy of affine logits is convex, so PGD from x must raise it."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    y = net(X).argmax(1)
    before = nn.functional.cross_entropy(net(X), y, reduction="none")
    result = PGD(steps=20, random_start=False)(net, X, y, threat=threat, keep="best")
    after = nn.functional.cross_entropy(net(result.x_adv), y, reduction="none")
    assert (after > before).all()


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"steps": 2.5}, {"steps": True}, {"reach": 0}, {"step_size": -0.1}, {"reach": "far"}]
)
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        PGD(**fields)
