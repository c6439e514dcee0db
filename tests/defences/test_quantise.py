"""Quantisation: exact values, zero derivative, and a BPDA attack that breaks it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import FGSM, PGD, Linf, data, zoo
from robustkit.attack import FLAT_GRADIENTS
from robustkit.defences import Quantise
from robustkit.errors import ArgumentError


@given(st.integers(2, 300), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=9))
def test_each_value_is_rounded_to_the_nearest_level(levels, values):
    out = Quantise(levels)(torch.tensor(values)[None])[0]
    grid = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    assert torch.equal(out, torch.tensor([(round(float(torch.tensor(v) * (levels - 1)))) for v in values]) / (levels - 1))
    distance = (torch.tensor(values, dtype=torch.float64)[:, None] - grid).abs()
    assert torch.allclose((out.double() - torch.tensor(values).double()).abs(), distance.amin(1), atol=1e-6)


@given(st.integers(2, 300))
def test_it_is_idempotent(levels):
    once = Quantise(levels)(torch.linspace(0, 1, 997))
    assert torch.equal(Quantise(levels)(once), once)
    assert len(once.unique()) == levels
    assert (once.min(), once.max()) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_views_have_the_value_of_the_defence_and_their_own_derivative(dtype):
    defence, x = Quantise(4), torch.linspace(0.01, 0.99, 24, dtype=dtype).reshape(2, 3, 4).requires_grad_()
    grads = {}
    for name, view in defence.views().items():
        out = view(x)
        assert out.dtype == dtype
        assert torch.equal(out, defence(x))
        (grads[name],) = torch.autograd.grad(out.sum(), x)
    assert list(grads) == ["bpda", "exact"]
    assert (grads["bpda"] == 1).all()
    assert (grads["exact"] == 0).all()


def test_the_exact_view_masks_the_gradient_and_bpda_breaks_the_defence():
    digits, net = data.load("mnist-5k").part(limit=60), zoo.load("mnist-cnn")
    guarded = Quantise(8).guard(net)
    correct = net(Quantise(8)(digits.x)).argmax(1) == digits.y
    masked = PGD(steps=20)(guarded.with_view("exact"), digits.x, digits.y, threat=Linf(0.3))
    adaptive = PGD(steps=20)(guarded, digits.x, digits.y, threat=Linf(0.3))
    assert FLAT_GRADIENTS in [flag.name for flag in masked.flags]
    assert not adaptive.flags
    assert int(masked.success.sum()) <= int((~correct).sum()) + 12  # by the random start
    assert adaptive.success.float().mean() >= 0.95
    assert torch.equal(adaptive.success, net(Quantise(8)(adaptive.x_adv)).argmax(1) != digits.y)


def test_byte_images_are_unchanged_with_256_levels():
    x = torch.arange(256).reshape(1, 1, 16, 16) / 255
    assert torch.equal(Quantise(256)(x), x)
    assert torch.equal(
        FGSM()(Quantise(256).guard(lambda z: z.flatten(1)[:, :3]), x, torch.tensor([0]), threat=Linf(0.1)).flat,
        torch.zeros(1, dtype=torch.int64),
    )


@pytest.mark.parametrize("levels", [1, 0, -3, 2.0, "8", True, None])
def test_fewer_than_two_levels_are_refused(levels):
    with pytest.raises(ArgumentError, match="levels"):
        Quantise(levels)


def test_repr():
    assert repr(Quantise(16)) == "Quantise(levels=16)"
