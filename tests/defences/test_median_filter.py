"""The filter against scipy's, its derivative in closed form, and attacks through its views."""

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
    """With few levels there are ties. Padding that does not repeat the last pixel is "mirror" in scipy, "reflect" in torch."""
    x = torch.randint(0, levels, (2, 3, height, width), generator=torch.Generator().manual_seed(seed)) / levels
    out = MedianFilter(size)(x)
    for image, filtered in zip(x.flatten(0, 1), out.flatten(0, 1), strict=True):
        assert torch.equal(filtered, torch.tensor(median_filter(image.numpy(), size, mode="mirror")))


def test_a_constant_image_and_a_straight_edge_are_unchanged():
    x = torch.full((1, 1, 8, 8), 0.3)
    assert torch.equal(MedianFilter(3)(x), x)
    x[..., 4:] = 0.9
    assert torch.equal(MedianFilter(3)(x), x)
    x[0, 0, 2, 2] = 1.0
    assert MedianFilter(3)(x)[0, 0, 2, 2] == torch.tensor(0.3)  # a single pixel is removed


def test_the_derivative_is_that_of_the_median_pixel():
    x = torch.randperm(30, generator=torch.Generator().manual_seed(0)).double().reshape(1, 1, 5, 6).requires_grad_()
    weight = torch.randn(1, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = {name: torch.autograd.grad((view(x) * weight).sum(), x)[0] for name, view in MedianFilter(3).views().items()}
    assert list(grads) == ["exact", "bpda"]
    assert torch.equal(grads["bpda"], weight)
    expected = torch.zeros_like(x)
    for row in range(5):
        for column in range(6):
            window = [
                (abs(row + i) if row + i < 5 else 3, abs(column + j) if column + j < 6 else 4)
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
            median = sorted(window, key=lambda at: float(x.detach()[0, 0, at[0], at[1]]))[4]
            expected[0, 0, median[0], median[1]] += weight[0, 0, row, column]
    assert torch.allclose(grads["exact"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_preserved(dtype):
    assert MedianFilter(2)(torch.rand(2, 1, 4, 4).to(dtype)).dtype == dtype


def test_adaptive_attacks_break_the_model_behind_it():
    digits, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn")
    target = MedianFilter(3).guard(net)
    assert (target.fn(digits.x).argmax(1) == digits.y).sum() >= 30
    for name in ("exact", "bpda"):
        result = PGD(steps=20)(target.with_view(name), digits.x, digits.y, threat=Linf(0.3))
        assert result.success.sum() >= 38
        assert torch.equal(result.success, target.fn(result.x_adv).argmax(1) != digits.y)


@pytest.mark.parametrize(("size", "shape"), [(3, (1, 8, 8)), (2, (3, 11, 5))])
def test_it_obeys_the_laws(size, shape, cases):
    cases(check_defence(MedianFilter(size), shape=shape, examples=8))


@pytest.mark.parametrize("size", [1, 0, -3, 3.0, "3", True, None])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(ArgumentError, match="size"):
        MedianFilter(size)


@pytest.mark.parametrize("shape", [(2, 64), (1, 1, 2, 9), (1, 1, 9, 2)])
def test_inputs_that_are_not_images_or_too_small_to_be_padded_are_refused(shape):
    with pytest.raises(ShapeError, match="images"):
        MedianFilter(5)(torch.rand(shape))
    assert MedianFilter(5)(torch.rand(1, 1, 3, 3)).shape == (1, 1, 3, 3)


def test_repr():
    assert repr(MedianFilter(3)) == "MedianFilter(size=3)"
