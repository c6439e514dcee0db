"""The values are those of one function and the derivatives those of another, exactly, in every mode that torch has."""

import copy
import pickle

import pytest
import torch
from torch import nn

from robustkit._behind import module_of
from robustkit.adaptive import bpda
from robustkit.errors import ArgumentError, ShapeError


def rounded(x):
    return (x * 7).round() / 7


def cubic(x):
    return x**3


def test_the_value_is_that_of_forward_bit_for_bit():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 5)
    asked = x.clone().requires_grad_()
    for close in (None, cubic):
        assert torch.equal(bpda(rounded, close)(asked), rounded(x))
        assert torch.equal(bpda(rounded, close)(x), rounded(x))
    straight = asked**3 + (rounded(asked) - asked**3).detach()
    assert not torch.equal(straight, rounded(x))  # which is why it is no such sum


def test_the_gradient_is_that_of_backward_in_closed_form():
    torch.manual_seed(0)
    x, weight = torch.rand(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weight * bpda(rounded)(x)).sum(), x)
    assert torch.equal(grad, weight)
    (grad,) = torch.autograd.grad((weight * bpda(rounded, cubic)(x)).sum(), x, create_graph=True)
    assert torch.allclose(grad, weight * 3 * x**2, rtol=1e-14)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, weight * 6 * x, rtol=1e-14)


def test_behind_it_the_derivative_is_taken_at_the_value_of_forward():
    x = torch.tensor([[0.3, 0.8]], requires_grad=True)
    (grad,) = torch.autograd.grad((bpda(rounded)(x) ** 2).sum(), x)
    assert torch.equal(grad, 2 * rounded(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # which torch itself uses for forward mode
def test_it_works_under_torch_func():
    torch.manual_seed(0)
    x = torch.rand(5, 3, dtype=torch.float64)
    f = bpda(rounded, cubic)
    assert torch.allclose(torch.func.grad(lambda z: f(z).sum())(x), 3 * x**2)
    assert torch.allclose(torch.func.vmap(torch.func.grad(lambda z: f(z).sum()))(x), 3 * x**2)
    value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    assert torch.equal(value, rounded(x))
    assert torch.allclose(tangent, 3 * x**2)
    row = torch.func.jacrev(f)(x[0])
    assert torch.allclose(row, torch.diag(3 * x[0] ** 2))


def test_parameters_of_forward_get_no_gradient_and_those_of_backward_do():
    deployed, close = nn.Linear(3, 3), nn.Linear(3, 3)
    bpda(deployed, close)(torch.rand(2, 3)).sum().backward()
    assert deployed.weight.grad is None
    assert close.weight.grad is not None


def test_without_gradients_backward_is_not_run():
    def never(x):
        raise AssertionError

    x = torch.rand(2, 3)
    with torch.no_grad():
        assert torch.equal(bpda(rounded, never)(x), rounded(x))


def test_forward_is_run_without_a_graph():
    modes = []

    def forward(x):
        modes.append(torch.is_grad_enabled())
        return x

    bpda(forward)(torch.rand(2, 3, requires_grad=True))
    assert modes == [False]


def test_forward_may_optimise_inside():
    def search(x):
        z = torch.zeros_like(x)
        with torch.enable_grad():
            for _ in range(50):
                z = z.detach().requires_grad_()
                z = z - 0.5 * torch.autograd.grad(((z - x.detach()) ** 2).sum(), z)[0]
        return z.detach()

    x = torch.rand(2, 3, requires_grad=True)
    out = bpda(search)(x)
    assert torch.allclose(out, x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))


def test_what_stands_behind_it_is_found_and_travels():
    deployed, close = nn.Linear(3, 3), nn.Linear(3, 3)
    assert set(module_of(bpda(deployed, close))) == {deployed, close}
    x = torch.rand(2, 3)
    for twin in (pickle.loads(pickle.dumps(bpda(rounded, cubic))), copy.deepcopy(bpda(rounded, cubic))):
        assert torch.equal(twin(x), rounded(x))


@pytest.mark.parametrize("arguments", [(None,), (0.5,), (rounded, 0.5)])
def test_what_is_no_function_is_refused(arguments):
    with pytest.raises(ArgumentError, match="must be a function"):
        bpda(*arguments)


@pytest.mark.parametrize("close", [None, lambda x: x[:, :2]])
def test_shapes_that_differ_are_refused(close):
    x = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(ShapeError, match="same shape"):
        bpda(lambda z: z[:, :1], close)(x)
