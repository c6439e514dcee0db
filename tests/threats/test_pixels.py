import pytest
import torch

from robustkit import Pixels
from robustkit.errors import ArgumentError, ShapeError


def test_a_step_leaves_a_poor_random_pixel():
    x = torch.full((1, 1, 3, 3), 0.5)
    start, grad = x.clone(), torch.zeros_like(x)
    start[0, 0, 0, 0] = 0.0  # the start darkened a pixel that the gradient brightens
    grad[0, 0, 0, 0], grad[0, 0, 2, 2] = 0.1, 1.0
    x_adv = Pixels(1).step(grad, start, x, 0.1)
    assert x_adv[0, 0, 0, 0] == 0.5
    assert x_adv[0, 0, 2, 2] == pytest.approx(0.6)


def test_the_size_counts_locations_and_not_channels():
    x = torch.zeros(2, 3, 4, 4)
    x_adv = x.clone()
    x_adv[0, :, 1, 1] = 1.0
    x_adv[1, 0, 0, 0] = x_adv[1, 2, 3, 3] = 0.1
    assert Pixels(1).size(x_adv, x).tolist() == [1, 2]
    assert Pixels(1).contains(x_adv, x).tolist() == [True, False]
    assert torch.equal(Pixels(1).project(x_adv, x)[0], x_adv[0])


def test_inputs_that_are_not_images_or_have_too_few_locations_are_refused():
    with pytest.raises(ShapeError, match=r"\(N, C, H, W\)"):
        Pixels(1).project(torch.zeros(2, 9), torch.zeros(2, 9))
    x = torch.full((1, 1, 2, 2), 0.5)
    with pytest.raises(ArgumentError, match="exceeds the 4 locations"):
        Pixels(5).project(x, x)
