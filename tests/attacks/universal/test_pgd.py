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
OWN = NET(X).argmax(1)
ONE = Noise(5, torch.zeros(1, dtype=torch.int64)).at("common", "start", 0)


def by_hand(epochs, batch, reach, clamp, linf):
    """Algorithm 2 of the paper with steps that shrink, on one start, with nothing of the attack in it."""
    ball = (Linf if linf else L2)(0.2, bounds=None)
    delta = ball.sample(torch.zeros(1, 1, 8, 8), ONE)
    for epoch in range(epochs):
        order = Noise(5, torch.arange(30)).at("order", 0, epoch).uniform().argsort()
        parts = order.split(batch)
        for number, rows in enumerate(parts):
            delta.requires_grad_()
            points = X[rows] + delta
            points = points + (points.clamp(0, 1) - points).detach()  # what the box cuts off keeps its gradient
            loss = nn.functional.cross_entropy(NET(points), OWN[rows], reduction="none").clamp(max=clamp)
            (grad,) = torch.autograd.grad(loss.mean(), delta)
            step = 2 * (1 - (epoch + number / len(parts)) / epochs) * reach / len(parts) * 0.2
            moved = delta.detach() + step * (grad.sign() if linf else grad / grad.norm())
            delta = moved.clamp(-0.2, 0.2) if linf else moved * min(1.0, 0.2 / float(moved.norm()))
    return delta


@pytest.mark.parametrize("linf", [True, False])
def test_it_is_the_loop_of_the_paper(linf):
    attack = UniversalPGD(epochs=4, batch=8, reach=1.5, clamp=1.7, starts=1)
    ours = attack.learn(NET, X, OWN, threat=(Linf if linf else L2)(0.2), seed=5)
    assert torch.allclose(ours.delta, by_hand(4, 8, 1.5, 1.7, linf), atol=1e-5)


def test_on_linear_scores_the_change_is_the_corner_that_is_best_for_all():
    """Far from the box, every image of a linear two-class model has one gradient: the answer is eps times its signs."""
    weight = torch.randn(6, generator=torch.Generator().manual_seed(3))
    net = nn.Linear(6, 2, bias=False)
    net.load_state_dict({"weight": torch.stack([weight, -weight])})
    x = 0.5 + 0.01 * torch.randn(20, 6, generator=torch.Generator().manual_seed(4))
    for wanted in (0, 1):
        made = UniversalPGD().learn(net, x, torch.full((20,), wanted), goal=ClassifyAs(), threat=Linf(0.3))
        assert torch.allclose(made.delta[0], (1 - 2 * wanted) * 0.3 * weight.sign(), atol=1e-6)


def test_the_best_of_several_starts_goes_on():
    """With one epoch in five for scouting, the end is that of the start that fooled most after it."""

    def fooled(delta):
        return float((NET((X + delta).clamp(0, 1)).argmax(1) != OWN).float().mean())

    attack, ends = UniversalPGD(epochs=5, batch=8, starts=4), []
    for start in range(4):
        delta = Linf(0.2, bounds=None).sample(torch.zeros(1, 1, 8, 8), Noise(5, ONE.ids).at("common", "start", start))
        delta = one_epoch(attack, delta, start, 0)
        ends.append((fooled(delta), delta))
    best = max(range(4), key=lambda k: ends[k][0])
    delta = ends[best][1]
    for epoch in range(1, 5):
        delta = one_epoch(attack, delta, best, epoch)
    ours = attack.learn(NET, X, OWN, threat=Linf(0.2), seed=5)
    assert torch.allclose(ours.delta, delta, atol=1e-5)


def one_epoch(attack, delta, start, epoch):
    parts = Noise(5, torch.arange(30)).at("order", start, epoch).uniform().argsort().split(attack.batch)
    for number, rows in enumerate(parts):
        point = (X[rows] + delta).clamp(0, 1).requires_grad_()
        loss = nn.functional.cross_entropy(NET(point), OWN[rows], reduction="none").clamp(max=attack.clamp)
        (grad,) = torch.autograd.grad(loss.mean(), point)
        step = 2 * (1 - (epoch + number / len(parts)) / attack.epochs) * attack.reach / len(parts) * 0.2
        delta = (delta + step * grad.sum(0, keepdim=True).sign()).clamp(-0.2, 0.2)
    return delta


def test_bad_values_are_refused():
    for fields in ({"epochs": 0}, {"batch": 0}, {"starts": 0}, {"reach": 0.0}, {"clamp": -1.0}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            UniversalPGD(**fields)
