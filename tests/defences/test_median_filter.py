"""The filter against scipy's, its derivative in closed form, and what it is worth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import median_filter

from robustkit import PGD, Linf, data, zoo
from robustkit.defences import MedianFilter
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing import check_defence


@given(st.integers(2, 5), st.integers(6, 9), st.integers(6, 9), st.integers(2, 200), st.integers(0, 2**31))
def test_it_is_the_filter_of_scipy_on_each_channel(size, height, width, levels, seed):
    """With few levels there are ties. Mirrored about the last pixel is "mirror" there and "reflect" in torch."""
    x = torch.randint(0, levels, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)) / levels
    out = MedianFilter(size)(x)
    for image, filtered in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        assert torch.equal(filtered, torch.tensor(median_filter(image.numpy(), size, mode="mirror")))


def test_a_constant_image_and_a_straight_edge_stay():
    x = torch.full((1, 1, 8, 8), 0.3)
    assert torch.equal(MedianFilter(3)(x), x)
    x[..., 4:] = 0.9
    assert torch.equal(MedianFilter(3)(x), x)
    x[0, 0, 2, 2] = 1.0
    assert MedianFilter(3)(x)[0, 0, 2, 2] == torch.tensor(0.3)  # a single pixel does not


def test_the_derivative_is_that_of_the_pixel_which_is_the_median():
    x = torch.randperm(30, generator=torch.Generator().manual_seed(0)).double().reshape(1, 1, 5, 6).requires_grad_()
    weight = torch.randn(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = {name: torch.autograd.grad((view(x) * weight).sum(), x)[0] for name, view in MedianFilter(3).views().items()}
    assert list(slopes) == ["exact", "bpda"]
    assert torch.equal(slopes["bpda"], weight)
    expected = torch.zeros_like(x)
    for row in range(5):
        for column in range(6):
            square = [
                (abs(row + i) if row + i < 5 else 3, abs(column + j) if column + j < 6 else 4)
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
            middle = sorted(square, key=lambda at: float(x.detach()[0, 0, at[0], at[1]]))[4]
            expected[0, 0, middle[0], middle[1]] += weight[0, 0, row, column]
    assert torch.allclose(slopes["exact"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_type_is_kept(dtype):
    assert MedianFilter(2)(torch.rand(2, 1, 4, 4).to(dtype)).dtype == dtype


def test_who_looks_through_it_breaks_what_is_behind():
    digits, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn")
    target = MedianFilter(3).guard(net)
    assert (target.fn(digits.x).argmax(1) == digits.y).sum() >= 30
    for name in ("exact", "bpda"):
        seeing = PGD(steps=20)(target.seen(name), digits.x, digits.y, threat=Linf(0.3))
        assert seeing.success.sum() >= 38
        assert torch.equal(seeing.success, target.fn(seeing.x_adv).argmax(1) != digits.y)


@pytest.mark.parametrize(("size", "shape"), [(3, (1, 8, 8)), (2, (3, 11, 5))])
def test_it_obeys_the_laws(size, shape, cases):
    cases(check_defence(MedianFilter(size), shape=shape, examples=8))


@pytest.mark.parametrize("size", [1, 0, -3, 3.0, "3", True, None])
def test_squares_without_neighbours_are_refused(size):
    with pytest.raises(ArgumentError, match="size"):
        MedianFilter(size)


@pytest.mark.parametrize("shape", [(2, 64), (1, 1, 2, 9), (1, 1, 9, 2)])
def test_what_is_no_image_or_too_small_to_be_mirrored_is_refused(shape):
    with pytest.raises(ShapeError, match="images"):
        MedianFilter(5)(torch.rand(shape))
    assert MedianFilter(5)(torch.rand(1, 1, 3, 3)).shape == (1, 1, 3, 3)


def test_the_recipe_is_readable():
    assert repr(MedianFilter(3)) == "MedianFilter(size=3)"
