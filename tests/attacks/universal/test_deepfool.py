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
PREDICTED = NET(X).argmax(1)


def fooling_rate(delta):
    return float((NET((X + delta).clamp(0, 1)).argmax(1) != PREDICTED).float().mean())


def reference_deepfool(x, y, delta, linf, steps):
    """The perturbation that DeepFool adds to x + delta, for one image, class by class."""
    total = torch.zeros_like(x)
    for _ in range(steps):
        point = (x + delta[0] + 1.02 * total).clamp(0, 1).requires_grad_()
        logits = NET(point[None])[0]
        if int(logits.argmax()) != y:
            break
        steps_to = []
        for k in set(range(4)) - {y}:
            (w,) = torch.autograd.grad(logits[k] - logits[y], point, retain_graph=True)
            x_adv = point.detach()
            w = torch.where(((x_adv <= 0) & (w < 0)) | ((x_adv >= 1) & (w > 0)), 0, w)  # leaves out blocked coordinates
            length = float((logits[y] - logits[k]).detach() / w.norm(1 if linf else 2))
            steps_to.append((length, w.sign() if linf else w / w.norm()))
        length, direction = min(steps_to, key=lambda step: step[0])
        total = total + length * direction
    return 1.02 * total[None]


@pytest.mark.parametrize("linf", [True, False])
def test_with_a_batch_of_one_it_equals_the_algorithm_of_the_paper(linf):
    attack, eps = UniversalDeepFool(passes=2, batch=1, fooling=1.0, candidates=3), 0.1 if linf else 0.7
    ours = attack.learn(NET, X, PREDICTED, threat=(Linf if linf else L2)(eps), seed=2)
    delta, best = torch.zeros(1, 1, 8, 8), (0.0, torch.zeros(1, 1, 8, 8))
    for number in range(2):
        for i in Noise(2, torch.arange(20)).at("order", number).uniform().argsort():
            moved = delta + reference_deepfool(X[i], int(PREDICTED[i]), delta, linf, 3)
            delta = moved.clamp(-eps, eps) if linf else moved * min(1.0, eps / max(float(moved.norm()), 1e-12))
        best = max((fooling_rate(delta), delta), best, key=lambda result: result[0])
    assert best[0] > 0
    assert torch.allclose(ours.delta, best[1], atol=1e-5)


def test_the_updates_of_a_batch_are_summed():
    attack = UniversalDeepFool(passes=1, batch=20, fooling=1.0)
    ours = attack.learn(NET, X, PREDICTED, threat=Linf(0.1), seed=2)
    total = sum(reference_deepfool(x, int(y), torch.zeros(1, 1, 8, 8), True, 3) for x, y in zip(X, PREDICTED, strict=True))
    assert torch.allclose(ours.delta, total.clamp(-0.1, 0.1), atol=1e-5)


def test_it_stops_at_the_requested_rate():
    """A perturbation that fools enough after one pass is returned, whatever further passes would give."""
    first = UniversalDeepFool(passes=1, fooling=1.0, batch=4).learn(NET, X, PREDICTED, threat=Linf(0.2), seed=2)
    rate = fooling_rate(first.delta)
    assert 0.1 < rate < 1
    more = UniversalDeepFool(passes=6, fooling=rate - 1e-6, batch=4).learn(NET, X, PREDICTED, threat=Linf(0.2), seed=2)
    assert torch.equal(first.delta, more.delta)
    assert first.forwards == more.forwards
    longer = UniversalDeepFool(passes=6, fooling=1.0, batch=4).learn(NET, X, PREDICTED, threat=Linf(0.2), seed=2)
    assert longer.forwards > more.forwards
    assert fooling_rate(longer.delta) >= rate


def test_invalid_fields_are_refused():
    for fields in ({"fooling": 0.0}, {"fooling": 1.2}, {"passes": 0}, {"batch": 0}, {"steps": 0}, {"overshoot": -0.1}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            UniversalDeepFool(**fields)
