import pytest
import torch
from torch import nn

from robustkit import L2, ClassifyAs, Linf
from robustkit._engine.noise import Noise
from robustkit.attacks import UniversalPGD
from robustkit.errors import ArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5)).eval()
X = torch.rand(30, 1, 8, 8)
PREDICTED = NET(X).argmax(1)
ONE = Noise(5, torch.zeros(1, dtype=torch.int64)).at("common", "start", 0)


def reference_uap_pgd(epochs, batch, reach, clamp, linf):
    """Algorithm 2 of the paper with decaying steps, from one start, independent of the attack."""
    ball = (Linf if linf else L2)(0.2, bounds=None)
    delta = ball.sample(torch.zeros(1, 1, 8, 8), ONE)
    for epoch in range(epochs):
        order = Noise(5, torch.arange(30)).at("order", 0, epoch).uniform().argsort()
        parts = order.split(batch)
        for number, rows in enumerate(parts):
            delta.requires_grad_()
            points = X[rows] + delta
            points = points + (points.clamp(0, 1) - points).detach()  # clamped coordinates keep their gradient
            loss = nn.functional.cross_entropy(NET(points), PREDICTED[rows], reduction="none").clamp(max=clamp)
            (grad,) = torch.autograd.grad(loss.mean(), delta)
            step = 2 * (1 - (epoch + number / len(parts)) / epochs) * reach / len(parts) * 0.2
            moved = delta.detach() + step * (grad.sign() if linf else grad / grad.norm())
            delta = moved.clamp(-0.2, 0.2) if linf else moved * min(1.0, 0.2 / float(moved.norm()))
    return delta


@pytest.mark.parametrize("linf", [True, False])
def test_it_equals_the_loop_of_the_paper(linf):
    attack = UniversalPGD(epochs=4, batch=8, reach=1.5, clamp=1.7, starts=1)
    ours = attack.learn(NET, X, PREDICTED, threat=(Linf if linf else L2)(0.2), seed=5)
    assert torch.allclose(ours.delta, reference_uap_pgd(4, 8, 1.5, 1.7, linf), atol=1e-5)


def test_on_a_linear_model_it_finds_the_best_corner():
    """Inside the box all images of a linear two-class model have one gradient: the optimum is eps times its sign."""
    weight = torch.randn(6, generator=torch.Generator().manual_seed(3))
    net = nn.Linear(6, 2, bias=False)
    net.load_state_dict({"weight": torch.stack([weight, -weight])})
    x = 0.5 + 0.01 * torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    for target in (0, 1):
        learned = UniversalPGD().learn(net, x, torch.full((20,), target), goal=ClassifyAs(), threat=Linf(0.3))
        assert torch.allclose(learned.delta[0], (1 - 2 * target) * 0.3 * weight.sign(), atol=1e-6)


def test_the_best_of_several_starts_is_continued():
    """After one of five epochs, only the start with the highest fooling rate continues."""

    def fooling_rate(delta):
        return float((NET((X + delta).clamp(0, 1)).argmax(1) != PREDICTED).float().mean())

    attack, results = UniversalPGD(epochs=5, batch=8, starts=4), []
    for start in range(4):
        delta = Linf(0.2, bounds=None).sample(torch.zeros(1, 1, 8, 8), Noise(5, ONE.ids).at("common", "start", start))
        delta = one_epoch(attack, delta, start, 0)
        results.append((fooling_rate(delta), delta))
    best = max(range(4), key=lambda k: results[k][0])
    delta = results[best][1]
    for epoch in range(1, 5):
        delta = one_epoch(attack, delta, best, epoch)
    ours = attack.learn(NET, X, PREDICTED, threat=Linf(0.2), seed=5)
    assert torch.allclose(ours.delta, delta, atol=1e-5)


def one_epoch(attack, delta, start, epoch):
    parts = Noise(5, torch.arange(30)).at("order", start, epoch).uniform().argsort().split(attack.batch)
    for number, rows in enumerate(parts):
        point = (X[rows] + delta).clamp(0, 1).requires_grad_()
        loss = nn.functional.cross_entropy(NET(point), PREDICTED[rows], reduction="none").clamp(max=attack.clamp)
        (grad,) = torch.autograd.grad(loss.mean(), point)
        step = 2 * (1 - (epoch + number / len(parts)) / attack.epochs) * attack.reach / len(parts) * 0.2
        delta = (delta + step * grad.sum(0, keepdim=True).sign()).clamp(-0.2, 0.2)
    return delta


def test_invalid_fields_are_refused():
    for fields in ({"epochs": 0}, {"batch": 0}, {"starts": 0}, {"reach": 0.0}, {"clamp": -1.0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            UniversalPGD(**fields)
