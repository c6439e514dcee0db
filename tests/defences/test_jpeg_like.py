"""The coder against scipy's transform and Pillow's JPEG, closed forms, and what its views lead to."""

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


def saved(image, quality):
    """A grey image (H, W) in [0, 1] through Pillow: what is read back, and the table of steps (8, 8)."""
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
def test_it_is_scipys_transform_rounded_to_pillows_table(quality):
    x = torch.rand(2, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(quality))
    _, table = saved(x[0, 0].numpy(), quality)
    expected = torch.stack([torch.stack([torch.tensor(by_hand(c.numpy(), table)) for c in image]) for image in x])
    assert torch.allclose(JPEGLike(quality)(x), expected, atol=1e-9)


@pytest.mark.parametrize("quality", [10, 50, 75])
def test_it_agrees_with_pillow_but_for_its_rounding_to_bytes(quality):
    """Pillow transforms in whole numbers, so a coefficient near a tie may fall to the other side: in one block of twelve."""
    down, across = np.mgrid[0:21, 0:30]  # no multiples of eight
    image = np.rint((0.5 + 0.3 * np.sin(down / 4) + 0.2 * np.cos(across / 3 + down / 7)).clip(0, 1) * 255) / 255
    coded, _ = saved(image, quality)
    apart = np.abs(JPEGLike(quality)(torch.tensor(image)[None, None])[0, 0].numpy() - coded) * 255
    blocks = [apart[top : top + 8, left : left + 8].max() for top in range(0, 21, 8) for left in range(0, 30, 8)]
    assert sum(block <= 0.52 for block in blocks) >= 11
    assert max(blocks) <= 3


@given(st.integers(1, 100), st.integers(0, 255))
def test_a_grey_area_stays_one_and_moves_to_the_nearest_step(quality, level):
    """Of a constant block there is one coefficient, 8 (level - 128)."""
    coder, x = JPEGLike(quality), torch.full((1, 1, 8, 16), level / 255, dtype=torch.float64)
    step = max(1, min(255, (16 * (5000 // quality if quality < 50 else 200 - 2 * quality) + 50) // 100))
    expected = min(255, max(0, round(8 * (level - 128) / step) * step / 8 + 128)) / 255
    assert torch.allclose(coder(x), torch.full_like(x, expected), atol=1e-9)
    if 8 * (level - 128) % step == 0:
        assert torch.allclose(coder(x), x, atol=1e-9)


def test_an_exact_tie_falls_the_same_way_in_any_batch():
    """White at quality 50 is 63.5 steps, and float arithmetic sits on either side of it."""
    coder = JPEGLike(50)
    for count in (1, 2, 7, 33):
        assert torch.equal(coder(torch.ones(count, 1, 8, 8)), torch.ones(count, 1, 8, 8))  # to 64 steps, which is even
        assert torch.equal(coder(torch.ones(count, 1, 8, 8).double()), torch.ones(count, 1, 8, 8).double())


@given(st.integers(0, 2**31))
def test_at_quality_100_a_block_moves_by_at_most_four_grey_levels(seed):
    """Each of 64 coefficients moves by half a step of one, and the transform keeps lengths."""
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert float((JPEGLike(100)(x) - x).norm()) <= 0.5 * 8 / 255 + 1e-12
    assert not torch.equal(JPEGLike(1)(x), x)


def test_the_bottom_and_right_are_continued_by_the_last_pixel():
    x = torch.rand(1, 2, 11, 13, generator=torch.Generator().manual_seed(0))
    larger = torch.cat([x, x[:, :, -1:].expand(-1, -1, 5, -1)], 2)
    larger = torch.cat([larger, larger[..., -1:].expand(-1, -1, -1, 3)], 3)
    assert torch.equal(JPEGLike(30)(x), JPEGLike(30)(larger)[:, :, :11, :13])


def test_each_view_has_the_derivative_that_it_names():
    """Inside [0, 1] that of the cubic is T' diag(3 (c - round(c))^2) T, T the transform of a block divided by the steps."""
    coder = JPEGLike(80)
    x = (0.4 + 0.2 * torch.rand(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).requires_grad_()
    weight = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    slopes = {name: torch.autograd.grad((view(x)[0, 0] * weight).sum(), x)[0][0, 0] for name, view in coder.views().items()}
    assert list(slopes) == ["bpda", "smooth", "exact"]
    assert torch.equal(slopes["bpda"], weight)
    assert not slopes["exact"].any()
    _, table = saved(x[0, 0].detach().numpy(), 80)
    c = dctn(x[0, 0].detach().numpy() * 255 - 128, norm="ortho") / table
    expected = idctn(3 * (c - np.rint(c)) ** 2 * dctn(weight.numpy(), norm="ortho"), norm="ortho")
    assert torch.allclose(slopes["smooth"], torch.tensor(expected), atol=1e-9)
    value = idctn((np.rint(c) + (c - np.rint(c)) ** 3) * table, norm="ortho")
    assert torch.allclose(coder.smooth(x)[0, 0], torch.tensor(value + 128) / 255, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_type_is_kept(dtype):
    x = torch.rand(2, 1, 9, 8, dtype=dtype)
    assert all(view(x).dtype == dtype for view in JPEGLike(60).views().values())


def test_it_hides_the_gradient_and_protects_hardly_anything():
    digits, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn")
    target = JPEGLike(50).guard(net)
    blind = PGD(steps=10)(target.seen("exact"), digits.x, digits.y, threat=Linf(0.2))
    assert FLAT_GRADIENTS in [flag.name for flag in blind.flags]
    for name in ("bpda", "smooth"):
        seeing = PGD(steps=20)(target.seen(name), digits.x, digits.y, threat=Linf(0.2))
        assert not seeing.flags
        assert seeing.success.sum() >= 32
        assert blind.success.sum() <= 8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 11, 5)])
def test_it_obeys_the_laws(shape, cases):
    cases(check_defence(JPEGLike(40), shape=shape, examples=8))


@pytest.mark.parametrize("quality", [0, 101, -1, 50.0, "50", True, None])
def test_qualities_outside_the_scale_are_refused(quality):
    with pytest.raises(ArgumentError, match="quality"):
        JPEGLike(quality)


def test_what_is_no_image_is_refused():
    with pytest.raises(ShapeError, match=r"\(2, 64\)"):
        JPEGLike()(torch.rand(2, 64))


def test_the_recipe_is_readable():
    assert repr(JPEGLike(75)) == "JPEGLike(quality=75)"
