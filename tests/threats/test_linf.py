import torch

from robustkit import Linf

X = torch.full((1, 1, 2, 2), 0.5)


def test_a_step_is_one_product_of_python_floats():
    fraction, eps = 2.5 / 40, 8 / 255
    x_adv = Linf(eps).step(torch.ones(1, 1, 2, 2), X, X, fraction)
    assert torch.equal(x_adv, X + (fraction * eps))
    assert torch.equal(Linf(eps).step(torch.ones(1, 1, 2, 2), X, X, fraction, length=0.01), X + 0.01)


def test_contains_allows_one_rounding_error_and_no_more():
    threat, x = Linf(0.3), torch.full((1, 1, 2, 2), 0.2)
    vertex = threat.steepest(torch.ones_like(x), x)
    assert threat.contains(vertex, x)
    assert not threat.contains(vertex + 2e-7, x)
    assert not threat.contains(torch.full_like(x, -1e-9), x)
