import math

import pytest
import torch

from robustkit import L2


def test_steepest_spends_the_budget_that_the_box_cuts_off():
    x = torch.tensor([0.9, 0.5, 0.5, 0.5]).reshape(1, 1, 2, 2)
    x_adv = L2(0.5).steepest(torch.tensor([1.0, 0.1, 0.0, 0.0]).reshape(1, 1, 2, 2), x)
    expected = torch.tensor([1.0, 0.5 + math.sqrt(0.25 - 0.01), 0.5, 0.5]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(x_adv, expected)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_steps_have_their_length_at_any_scale_of_the_gradient(scale):
    grad = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    x = torch.full_like(grad, 0.5)
    torch.testing.assert_close(L2(0.5).size(L2(0.5).step(grad, x, x, 0.2), x), torch.full((3,), 0.1).double())
