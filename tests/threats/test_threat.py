import math

import pytest
import torch
from cases import THREATS

from robustkit import L1, L2, Linf, Pixels
from robustkit._engine.noise import Noise
from robustkit._engine.tensors import round_towards
from robustkit.errors import ArgumentError

X = torch.full((1, 1, 2, 2), 0.5)


def image(*values):
    return torch.tensor(values).reshape(1, 1, 2, 2)


def test_steepest_agrees_with_values_by_hand():
    grad = image(4.0, -3.0, 0.0, 1.0)
    assert torch.equal(Linf(0.25).steepest(grad, X), image(0.75, 0.25, 0.5, 0.75))
    torch.testing.assert_close(L2(0.1).steepest(image(4.0, -3.0, 0.0, 0.0), X), image(0.58, 0.44, 0.5, 0.5))
    # The first coordinate saturates at 0.5; the remaining budget goes to the next.
    torch.testing.assert_close(L1(0.6).steepest(grad, X), image(1.0, 0.4, 0.5, 0.5))
    assert torch.equal(Pixels(2).steepest(grad, X), image(1.0, 0.0, 0.5, 0.5))


def test_samples_are_uniform_in_the_ball():
    x = torch.full((4000, 1, 1, 2), 0.5)
    noise = Noise(0, torch.arange(4000))
    # In two dimensions half of a uniform sample lies within 1/sqrt(2) of the radius.
    for threat, share in ((L2(0.4), 0.5), (L1(0.4), 0.5), (Linf(0.4), 0.5)):
        inner = threat.size(threat.sample(x, noise), x) <= 0.4 * math.sqrt(0.5)
        assert inner.double().mean() == pytest.approx(share, abs=4 * math.sqrt(0.25 / 4000)), threat
    changed = (Pixels(1).sample(x, noise) != x).flatten(1).double()
    assert (changed.sum(1) <= 1).all()
    assert changed.mean(0)[0] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


@pytest.mark.parametrize("kind", THREATS)
def test_equality_and_repr(kind):
    assert kind(1) == kind(1)
    assert kind(1) != kind(1, bounds=(-1.0, 1.0))
    assert hash(kind(1)) == hash(kind(1))
    assert repr(kind(1)) == f"{kind.__name__}(eps=1, bounds=(0.0, 1.0))"
    per_example = kind(torch.ones(2, dtype=torch.float64))
    assert per_example == kind(torch.ones(2, dtype=torch.float64))
    assert per_example != kind(1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linf(0), "eps=0"),
        (lambda: Linf(8), "255"),
        (lambda: L2(-1.0), "eps=-1.0"),
        (lambda: L2(math.nan), "nan"),
        (lambda: L1(math.inf), "inf"),
        (lambda: L2("big"), "big"),
        (lambda: L2(torch.tensor([0.1, 0.0])), "above 0"),
        (lambda: Pixels(1.5), "whole number"),
        (lambda: Pixels(1, bounds=None), "needs bounds"),
        (lambda: Linf(0.1, bounds=(1.0, 0.0)), "two finite numbers"),
        (lambda: Linf(0.1, bounds=(0.0, math.inf)), "two finite numbers"),
    ],
)
def test_invalid_threats_are_refused(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_towards_x(dtype):
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for threat in (Linf(8 / 255), L2(0.5), L1(3.0)):
        x_adv = round_towards(threat.sample(x.float(), Noise(0, torch.arange(4))), x)
        assert x_adv.dtype == dtype
        assert threat.contains(x_adv, x).all()
