"""Compression against scipy's transform, Pillow's JPEG and closed forms; attacks through its views."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn

from robustkit import PGD, Linf, data, zoo
from robustkit.attack import FLAT_GRADIENTS
from robustkit.defences import JPEGLike
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing import check_defence


def pillow_jpeg(image, quality):
    """A grey image (H, W) in [0, 1] saved and read by Pillow, and its quantisation table (8, 8)."""
    store = io.BytesIO()
    Image.fromarray(np.uint8(np.rint(image * 255))).save(store, "JPEG", quality=quality)
    read = Image.open(store)
    return np.asarray(read, dtype=float) / 255, np.array(read.quantization[0]).reshape(8, 8)


def by_hand(image, table):
    """Block by block with scipy's transform, for sides that are multiples of eight."""
    out = np.zeros(image.shape)
    for top in range(0, image.shape[0], 8):
        for left in range(0, image.shape[1], 8):
            block = dctn(image[top : top + 8, left : left + 8] * 255 - 128, norm="ortho")
            out[top : top + 8, left : left + 8] = (idctn(np.rint(block / table) * table, norm="ortho") + 128) / 255
    return out.clip(0, 1)


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 51, 75, 95, 100])
def test_it_is_the_dct_of_scipy_rounded_to_the_table_of_pillow(quality):
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(quality))
    _, table = pillow_jpeg(x[0, 0].numpy(), quality)
    expected = torch.stack([torch.stack([torch.tensor(by_hand(c.numpy(), table)) for c in image]) for image in x])
    assert torch.allclose(JPEGLike(quality)(x), expected, atol=1e-9)


@pytest.mark.parametrize("quality", [10, 50, 75])
def test_it_agrees_with_pillow_up_to_rounding_to_bytes(quality):
    """Pillow transforms in integers, so a coefficient near a tie may be rounded the other way: in one block of twelve."""
    row, column = np.mgrid[0:21, 0:30]  # not multiples of eight
    image = np.rint((0.5 + 0.3 * np.sin(row / 4) + 0.2 * np.cos(column / 3 + row / 7)).clip(0, 1) * 255) / 255
    compressed, _ = pillow_jpeg(image, quality)
    difference = np.abs(JPEGLike(quality)(torch.tensor(image)[None, None])[0, 0].numpy() - compressed) * 255
    blocks = [difference[top : top + 8, left : left + 8].max() for top in range(0, 21, 8) for left in range(0, 30, 8)]
    assert sum(block <= 0.52 for block in blocks) >= 11
    assert max(blocks) <= 3


@given(st.integers(1, 100), st.integers(0, 255))
def test_a_constant_block_is_rounded_to_the_nearest_step(quality, level):
    """A constant block has one coefficient, 8 (level - 128)."""
    jpeg, x = JPEGLike(quality), torch.full((1, 1, 8, 16), level / 255, dtype=torch.float64)
    step = max(1, min(255, (16 * (5000 // quality if quality < 50 else 200 - 2 * quality) + 50) // 100))
    expected = min(255, max(0, round(8 * (level - 128) / step) * step / 8 + 128)) / 255
    assert torch.allclose(jpeg(x), torch.full_like(x, expected), atol=1e-9)
    if 8 * (level - 128) % step == 0:
        assert torch.allclose(jpeg(x), x, atol=1e-9)


def test_an_exact_tie_is_rounded_the_same_way_in_any_batch():
    """White at quality 50 is 63.5 steps; float arithmetic gives values on either side of it."""
    jpeg = JPEGLike(50)
    for count in (1, 2, 7, 33):
        assert torch.equal(jpeg(torch.ones(count, 1, 8, 8)), torch.ones(count, 1, 8, 8))  # to 64 steps, which is even
        assert torch.equal(jpeg(torch.ones(count, 1, 8, 8).double()), torch.ones(count, 1, 8, 8).double())


@given(st.integers(0, 2**31))
def test_at_quality_100_a_block_changes_by_at_most_four_grey_levels(seed):
    """Each of 64 coefficients changes by at most half a step of one, and the transform preserves norms."""
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert float((JPEGLike(100)(x) - x).norm()) <= 0.5 * 8 / 255 + 1e-12
    assert not torch.equal(JPEGLike(1)(x), x)


def test_the_bottom_and_right_are_padded_with_the_last_pixel():
    x = torch.rand(1, 2, 11, 13, generator=torch.Generator().manual_seed(0))
    larger = torch.cat([x, x[:, :, -1:].expand(-1, -1, 5, -1)], 2)
    larger = torch.cat([larger, larger[..., -1:].expand(-1, -1, -1, 3)], 3)
    assert torch.equal(JPEGLike(30)(x), JPEGLike(30)(larger)[:, :, :11, :13])


def test_each_view_has_the_derivative_that_it_names():
    """Inside [0, 1] the derivative of "smooth" is T' diag(3 (c - round(c))^2) T, T the DCT divided by the steps."""
    jpeg = JPEGLike(80)
    x = (0.4 + 0.2 * torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    weight = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = {name: torch.autograd.grad((view(x)[0, 0] * weight).sum(), x)[0][0, 0] for name, view in jpeg.views().items()}
    assert list(grads) == ["bpda", "smooth", "exact"]
    assert torch.equal(grads["bpda"], weight)
    assert not grads["exact"].any()
    _, table = pillow_jpeg(x[0, 0].detach().numpy(), 80)
    c = dctn(x[0, 0].detach().numpy() * 255 - 128, norm="ortho") / table
    expected = idctn(3 * (c - np.rint(c)) ** 2 * dctn(weight.numpy(), norm="ortho"), norm="ortho")
    assert torch.allclose(grads["smooth"], torch.tensor(expected), atol=1e-9)
    value = idctn((np.rint(c) + (c - np.rint(c)) ** 3) * table, norm="ortho")
    assert torch.allclose(jpeg.smooth(x)[0, 0], torch.tensor(value + 128) / 255, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_preserved(dtype):
    x = torch.rand(2, 1, 9, 8, dtype=dtype)
    assert all(view(x).dtype == dtype for view in JPEGLike(60).views().values())


def test_the_exact_view_masks_the_gradient_and_the_others_break_the_defence():
    digits, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn")
    target = JPEGLike(50).guard(net)
    masked = PGD(steps=10)(target.with_view("exact"), digits.x, digits.y, threat=Linf(0.2))
    assert FLAT_GRADIENTS in [flag.name for flag in masked.flags]
    for name in ("bpda", "smooth"):
        adaptive = PGD(steps=20)(target.with_view(name), digits.x, digits.y, threat=Linf(0.2))
        assert not adaptive.flags
        assert adaptive.success.sum() >= 32
        assert masked.success.sum() <= 8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 5)])
def test_it_obeys_the_laws(shape, cases):
    cases(check_defence(JPEGLike(40), shape=shape, examples=8))


@pytest.mark.parametrize("quality", [0, 101, -1, 50.0, "50", True, None])
def test_an_invalid_quality_is_refused(quality):
    with pytest.raises(ArgumentError, match="quality"):
        JPEGLike(quality)


def test_inputs_that_are_not_images_are_refused():
    with pytest.raises(ShapeError, match=r"\(2, 64\)"):
        JPEGLike()(torch.rand(2, 64))


def test_repr():
    assert repr(JPEGLike(75)) == "JPEGLike(quality=75)"
