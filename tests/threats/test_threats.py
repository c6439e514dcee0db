import math

import pytest
import torch
from cases import THREATS

from robustkit import L1, L2, Linf, Pixels
from robustkit._engine.noise import Noise
from robustkit.errors import ArgumentError, ShapeError

X = torch.full((1, 1, 2, 2), 0.5)


def image(*values):
    return torch.tensor(values).reshape(1, 1, 2, 2)


def test_answers_by_hand():
    grad = image(4.0, -3.0, 0.0, 1.0)
    assert torch.equal(Linf(0.25).steepest(grad, X), image(0.75, 0.25, 0.5, 0.75))
    torch.testing.assert_close(L2(0.1).steepest(image(4.0, -3.0, 0.0, 0.0), X), image(0.58, 0.44, 0.5, 0.5))
    # The first coordinate is full at 0.5; what is left goes to the next.
    torch.testing.assert_close(L1(0.6).steepest(grad, X), image(1.0, 0.4, 0.5, 0.5))
    assert torch.equal(Pixels(2).steepest(grad, X), image(1.0, 0.0, 0.5, 0.5))


def test_l2_steepest_spends_what_the_box_cuts_off():
    x = image(0.9, 0.5, 0.5, 0.5)
    moved = L2(0.5).steepest(image(1.0, 0.1, 0.0, 0.0), x)
    torch.testing.assert_close(moved, image(1.0, 0.5 + math.sqrt(0.25 - 0.01), 0.5, 0.5))


def test_a_step_is_one_product_of_python_floats():
    fraction, eps = 2.5 / 40, 8 / 255
    moved = Linf(eps).step(torch.ones(1, 1, 2, 2), X, X, fraction)
    assert torch.equal(moved, X + (fraction * eps))
    assert torch.equal(Linf(eps).step(torch.ones(1, 1, 2, 2), X, X, fraction, length=0.01), X + 0.01)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_l2_steps_have_their_length_whatever_the_scale_of_the_gradient(scale):
    grad = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    x = torch.full_like(grad, 0.5)
    torch.testing.assert_close(L2(0.5).size(L2(0.5).step(grad, x, x, 0.2), x), torch.full((3,), 0.1).double())


def test_a_poor_random_pixel_is_left_behind():
    x = torch.full((1, 1, 3, 3), 0.5)
    start, grad = x.clone(), torch.zeros_like(x)
    start[0, 0, 0, 0] = 0.0  # the start darkened a pixel that ought to be brighter
    grad[0, 0, 0, 0], grad[0, 0, 2, 2] = 0.1, 1.0
    moved = Pixels(1).step(grad, start, x, 0.1)
    assert moved[0, 0, 0, 0] == 0.5
    assert moved[0, 0, 2, 2] == pytest.approx(0.6)


def test_pixels_count_locations_and_not_channels():
    x = torch.zeros(2, 3, 4, 4)
    x_adv = x.clone()
    x_adv[0, :, 1, 1] = 1.0
    x_adv[1, 0, 0, 0] = x_adv[1, 2, 3, 3] = 0.1
    assert Pixels(1).size(x_adv, x).tolist() == [1, 2]
    assert Pixels(1).contains(x_adv, x).tolist() == [True, False]
    assert torch.equal(Pixels(1).project(x_adv, x)[0], x_adv[0])


def test_samples_fill_the_ball():
    x = torch.full((4000, 1, 1, 2), 0.5)
    noise = Noise(0, torch.arange(4000))
    # In two dimensions half of a uniform sample lies within 1/sqrt(2) of the radius (L1, L2), a quarter of the square.
    for threat, share in ((L2(0.4), 0.5), (L1(0.4), 0.5), (Linf(0.4), 0.5)):
        near = threat.size(threat.sample(x, noise), x) <= 0.4 * math.sqrt(0.5)
        assert near.double().mean() == pytest.approx(share, abs=4 * math.sqrt(0.25 / 4000)), threat
    places = (Pixels(1).sample(x, noise) != x).flatten(1).double()
    assert (places.sum(1) <= 1).all()
    assert places.mean(0)[0] == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 4000))


def test_contains_has_the_slack_of_one_rounding_and_no_more():
    threat, x = Linf(0.3), torch.full((1, 1, 2, 2), 0.2)
    edge = threat.steepest(torch.ones_like(x), x)
    assert threat.contains(edge, x)
    assert not threat.contains(edge + 2e-7, x)
    assert not threat.contains(torch.full_like(x, -1e-9), x)


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
def test_senseless_threats_are_refused(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_pixels_refuse_what_is_no_image():
    with pytest.raises(ShapeError, match=r"\(N, C, H, W\)"):
        Pixels(1).project(torch.zeros(2, 9), torch.zeros(2, 9))
    with pytest.raises(ArgumentError, match="exceeds the 4 locations"):
        Pixels(5).project(X, X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_towards_x(dtype):
    from robustkit._engine.tensors import round_towards

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    for threat in (Linf(8 / 255), L2(0.5), L1(3.0)):
        x_adv = round_towards(threat.sample(x.float(), Noise(0, torch.arange(4))), x)
        assert x_adv.dtype == dtype
        assert threat.contains(x_adv, x).all()
