"""The output is the image resized as by torch, at a random position, padded with zeros."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from robustkit import PGD, Linf, data, zoo
from robustkit._engine.noise import Noise
from robustkit.defences import RandomResize
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing import check_defence


def bounding_box(image):
    """Top, left, height and width of the nonzero part of an image (C, H, W)."""
    rows, columns = image[0].amax(1).nonzero().flatten(), image[0].amax(0).nonzero().flatten()
    return int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1


@given(st.floats(0.2, 1), st.floats(0, 1), st.integers(5, 17), st.integers(5, 17), st.integers(0, 2**31))
def test_it_is_the_image_resized_by_torch_and_padded_with_zeros(low, share, height, width, seed):
    high = low + (1 - low) * share
    x = 0.1 + 0.9 * torch.rand(4, 2, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    out = RandomResize(low, high)(x, noise=Noise(seed, torch.arange(4)))
    for image, resized in zip(x, out, strict=True):
        top, left, tall, wide = bounding_box(resized)
        assert round(low * height) <= tall <= round(high * height)
        assert round(low * width) <= wide <= round(high * width)
        expected_image = interpolate(image[None], size=(tall, wide), mode="bilinear", align_corners=False)[0]
        expected = torch.zeros_like(image)
        expected[:, top : top + tall, left : left + wide] = expected_image
        assert torch.allclose(resized, expected, atol=1e-6)


def test_sizes_and_positions_follow_from_three_random_numbers():
    x, noise = torch.rand(64, 1, 12, 20) + 0.1, Noise(1, torch.arange(64))
    out, uniform = RandomResize(0.5, 0.9)(x, noise=noise), noise.at("size and place").uniform(3)
    for resized, (size, down, across) in zip(out, uniform.double().tolist(), strict=True):
        tall, wide = round((0.5 + 0.4 * size) * 12), round((0.5 + 0.4 * size) * 20)
        assert bounding_box(resized) == (int(down * (13 - tall)), int(across * (21 - wide)), tall, wide)
    torch.manual_seed(0)
    out = RandomResize(0.5, 0.9)(x)
    torch.manual_seed(0)
    uniform = torch.rand(64, 3)
    assert bounding_box(out[7])[2] == round((0.5 + 0.4 * float(uniform[7, 0])) * 12)
    assert bounding_box(out[7])[0] == int(uniform[7, 1] * (13 - bounding_box(out[7])[2]))


def test_all_positions_are_equally_likely():
    """Half of 6 pixels: 4 x 4 positions; of 1,600 draws each gets 100, within five standard deviations of the binomial."""
    x = torch.ones(1600, 1, 6, 6)
    out = RandomResize(0.5, 0.5)(x, noise=Noise(0, torch.arange(1600)))
    counts = torch.zeros(4, 4)
    for resized in out:
        top, left, tall, wide = bounding_box(resized)
        assert (tall, wide) == (3, 3)
        counts[top, left] += 1
    assert counts.sum() == 1600
    assert ((counts - 100).abs() < 5 * 9.7).all()


def test_a_scale_of_one_is_the_identity():
    x = torch.rand(3, 2, 7, 9)
    assert torch.equal(RandomResize(1, 1)(x), x)


def test_the_derivative_is_the_transposed_map():
    """The map is linear, so its derivative in any direction is its value at that direction."""
    noise = Noise(0, torch.arange(2))
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    u, v = (torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    defence = RandomResize(0.5, 0.8)
    assert list(defence.views()) == ["exact"]
    (grad,) = torch.autograd.grad((defence(x, noise=noise) * v).sum(), x)
    assert torch.allclose((grad * u).sum(), (defence(u, noise=noise) * v).sum())


@pytest.mark.slow
def test_averaged_gradients_break_the_model_behind_it():
    digits, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn")
    target = RandomResize(0.8, 1.0).guard(net, draws=10)
    assert (target.fn(digits.x).argmax(1) == digits.y).sum() >= 30
    assert PGD(steps=20)(target, digits.x, digits.y, threat=Linf(0.3)).success.sum() >= 36


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 5)])
def test_it_obeys_the_laws(shape, cases):
    cases(check_defence(RandomResize(0.5, 0.9), shape=shape, examples=8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_preserved(dtype):
    assert RandomResize()(torch.rand(2, 1, 6, 6).to(dtype)).dtype == dtype


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.5, 1), (0.9, 0.8), (0.5, 1.1), ("a", 1), (True, 1), (0.5, None)])
def test_invalid_scales_are_refused(low, high):
    with pytest.raises(ArgumentError, match="low="):
        RandomResize(low, high)


def test_inputs_that_are_not_images_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 64\)"):
        RandomResize()(torch.rand(2, 64))


def test_repr():
    assert repr(RandomResize(0.9, 1.0)) == "RandomResize(low=0.9, high=1.0)"
