import pytest
import torch
from torch import nn

from robustkit import L2, Linf
from robustkit._engine.noise import Noise
from robustkit.attacks import UniversalDeepFool
from robustkit.errors import ArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 4)).eval()
X = torch.rand(20, 1, 8, 8)
OWN = NET(X).argmax(1)


def fooled(delta):
    return float((NET((X + delta).clamp(0, 1)).argmax(1) != OWN).float().mean())


def minimal(x, y, delta, linf, steps):
    """What DeepFool adds to x + delta, for one image, class by class."""
    total = torch.zeros_like(x)
    for _ in range(steps):
        point = (x + delta[0] + 1.02 * total).clamp(0, 1).requires_grad_()
        logits = NET(point[None])[0]
        if int(logits.argmax()) != y:
            break
        ways = []
        for k in set(range(4)) - {y}:
            (w,) = torch.autograd.grad(logits[k] - logits[y], point, retain_graph=True)
            at = point.detach()
            w = torch.where(((at <= 0) & (w < 0)) | ((at >= 1) & (w > 0)), 0, w)  # what the box holds fast does not count
            length = float((logits[y] - logits[k]).detach() / w.norm(1 if linf else 2))
            ways.append((length, w.sign() if linf else w / w.norm()))
        length, direction = min(ways, key=lambda way: way[0])
        total = total + length * direction
    return 1.02 * total[None]


@pytest.mark.parametrize("linf", [True, False])
def test_with_a_batch_of_one_it_is_the_algorithm_of_the_paper(linf):
    attack, eps = UniversalDeepFool(passes=2, batch=1, fooling=1.0, candidates=3), 0.1 if linf else 0.7
    ours = attack.learn(NET, X, OWN, threat=(Linf if linf else L2)(eps), seed=2)
    delta, best = torch.zeros(1, 1, 8, 8), (0.0, torch.zeros(1, 1, 8, 8))
    for number in range(2):
        for i in Noise(2, torch.arange(20)).at("order", number).uniform().argsort():
            moved = delta + minimal(X[i], int(OWN[i]), delta, linf, 3)
            delta = moved.clamp(-eps, eps) if linf else moved * min(1.0, eps / max(float(moved.norm()), 1e-12))
        best = max((fooled(delta), delta), best, key=lambda end: end[0])
    assert best[0] > 0
    assert torch.allclose(ours.delta, best[1], atol=1e-5)


def test_a_batch_adds_up_what_its_examples_need_from_the_same_change():
    attack = UniversalDeepFool(passes=1, batch=20, fooling=1.0)
    ours = attack.learn(NET, X, OWN, threat=Linf(0.1), seed=2)
    added = sum(minimal(x, int(y), torch.zeros(1, 1, 8, 8), True, 3) for x, y in zip(X, OWN, strict=True))
    assert torch.allclose(ours.delta, added.clamp(-0.1, 0.1), atol=1e-5)


def test_it_stops_at_the_wanted_rate():
    """A change that fools enough after one pass is what comes back, whatever further passes would give."""
    first = UniversalDeepFool(passes=1, fooling=1.0, batch=4).learn(NET, X, OWN, threat=Linf(0.2), seed=2)
    reached = fooled(first.delta)
    assert 0.1 < reached < 1
    more = UniversalDeepFool(passes=6, fooling=reached - 1e-6, batch=4).learn(NET, X, OWN, threat=Linf(0.2), seed=2)
    assert torch.equal(first.delta, more.delta)
    assert first.forwards == more.forwards
    longer = UniversalDeepFool(passes=6, fooling=1.0, batch=4).learn(NET, X, OWN, threat=Linf(0.2), seed=2)
    assert longer.forwards > more.forwards
    assert fooled(longer.delta) >= reached


def test_bad_values_are_refused():
    for fields in ({"fooling": 0.0}, {"fooling": 1.2}, {"passes": 0}, {"batch": 0}, {"steps": 0}, {"overshoot": -0.1}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            UniversalDeepFool(**fields)
