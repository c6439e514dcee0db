"""BPDA has the values of one function and the derivatives of another, exactly, in every mode of torch; EOT averages."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import PGD, Linf, Target
from robustkit._engine.introspection import module_of
from robustkit.adaptive import bpda, eot, mean_output, mean_probability
from robustkit.errors import ArgumentError, ShapeError


def rounded(x):
    return (x * 7).round() / 7


def cubic(x):
    return x**3


def test_the_value_is_that_of_forward_bit_for_bit():
    torch.manual_seed(0)
    x = torch.rand(200, 3, 5)
    leaf = x.clone().requires_grad_()
    for backward in (None, cubic):
        assert torch.equal(bpda(rounded, backward)(leaf), rounded(x))
        assert torch.equal(bpda(rounded, backward)(x), rounded(x))
    straight_through = leaf**3 + (rounded(leaf) - leaf**3).detach()
    assert not torch.equal(straight_through, rounded(x))  # which is why bpda does not use this sum


def test_the_gradient_is_that_of_backward_in_closed_form():
    torch.manual_seed(0)
    x, weight = torch.rand(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad((weight * bpda(rounded)(x)).sum(), x)
    assert torch.equal(grad, weight)
    (grad,) = torch.autograd.grad((weight * bpda(rounded, cubic)(x)).sum(), x, create_graph=True)
    assert torch.allclose(grad, weight * 3 * x**2, rtol=1e-14)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(second, weight * 6 * x, rtol=1e-14)


def test_later_derivatives_are_taken_at_the_value_of_forward():
    x = torch.tensor([[0.3, 0.8]], requires_grad=True)
    (grad,) = torch.autograd.grad((bpda(rounded)(x) ** 2).sum(), x)
    assert torch.equal(grad, 2 * rounded(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch itself uses it for forward mode
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
    deployed, approximation = nn.Linear(3, 3), nn.Linear(3, 3)
    bpda(deployed, approximation)(torch.rand(2, 3)).sum().backward()
    assert deployed.weight.grad is None
    assert approximation.weight.grad is not None


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


def test_its_modules_are_found_and_it_can_be_pickled_and_copied():
    deployed, approximation = nn.Linear(3, 3), nn.Linear(3, 3)
    assert set(module_of(bpda(deployed, approximation))) == {deployed, approximation}
    x = torch.rand(2, 3)
    for twin in (pickle.loads(pickle.dumps(bpda(rounded, cubic))), copy.deepcopy(bpda(rounded, cubic))):
        assert torch.equal(twin(x), rounded(x))


@pytest.mark.parametrize("arguments", [(None,), (0.5,), (rounded, 0.5)])
def test_arguments_that_are_not_functions_are_refused(arguments):
    with pytest.raises(ArgumentError, match="must be a function"):
        bpda(*arguments)


@pytest.mark.parametrize("backward", [None, lambda x: x[:, :2]])
def test_different_output_shapes_are_refused(backward):
    x = torch.rand(2, 3, requires_grad=True)
    with pytest.raises(ShapeError, match="same shape"):
        bpda(lambda z: z[:, :1], backward)(x)


class NoisyLinear(nn.Module):
    """W (x + sigma noise), with noise per row. It records the number of rows of each call and whether gradients are enabled."""

    def __init__(self, sigma=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
        self.sigma, self.calls = sigma, []

    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        return (x + self.sigma * torch.randn_like(x)) @ self.weight.T


def squashed(x):
    """A nonlinear random function: its gradient differs between rows and between draws."""
    return torch.tanh(3 * x * torch.rand_like(x)).cumsum(1)


def factors_of_three_generators(n):
    """A factor per row, the sum of random numbers of torch, numpy and Python."""
    factors = torch.rand(n) + torch.tensor(np.random.rand(n)) + torch.tensor([random.random() for _ in range(n)])
    return factors.double()[:, None]


def value_and_vjp(view, x, weight):
    """The value of the view and its vector-Jacobian product with `weight`."""
    x = x.clone().requires_grad_()
    out = view(x)
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


def test_the_average_of_a_noisy_linear_model_agrees_with_its_closed_form():
    torch.manual_seed(0)
    net, x, weight = NoisyLinear(), torch.rand(5, 4), torch.randn(5, 3)
    out, grad = value_and_vjp(eot(net, 40_000), x, weight)
    # Each output is normal with standard deviation sigma |w_j| / sqrt(draws); the bound is five of them.
    bound = 5 * net.sigma * net.weight.detach().norm(dim=1) / 200
    assert ((out - x @ net.weight.detach().T).abs() < bound).all()
    assert torch.allclose(grad, weight @ net.weight.detach(), atol=1e-5)  # additive noise does not change the gradient
    torch.manual_seed(7)
    normal = torch.randn(20, 4)  # the draws of an example are consecutive
    torch.manual_seed(7)
    expected = (x + 0.5 * normal.reshape(5, 4, 4).mean(1)) @ net.weight.T
    assert torch.allclose(eot(net, 4)(x), expected, atol=1e-6)


@pytest.mark.parametrize("most", [1000, 21, 5, 1])
def test_value_and_gradient_are_the_means_of_single_draws(most):
    x, weight = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    out, grad = value_and_vjp(eot(squashed, 7, most=most), x, weight)
    torch.manual_seed(3)
    factors = torch.cat([torch.rand(len(part), 4, dtype=torch.float64) for part in torch.zeros(21).split(most)])
    outs, grads = torch.zeros_like(x), torch.zeros_like(x)
    for row in range(3):
        for draw in range(7):
            z = x[row].clone().requires_grad_()
            single = torch.tanh(3 * z * factors[7 * row + draw]).cumsum(0)
            outs[row] += single.detach() / 7
            grads[row] += torch.autograd.grad((single * weight[row]).sum(), z)[0] / 7
    assert torch.allclose(out, outs, rtol=1e-14)
    assert torch.allclose(grad, grads, rtol=1e-13)


def test_it_equals_averaged_gradients_for_a_loss_that_is_linear_in_the_output():
    """Target(draws=k) averages gradients; the two agree for linear losses only."""
    torch.manual_seed(0)
    net, x, y = NoisyLinear(sigma=1.0), torch.rand(400, 4), torch.zeros(400, dtype=torch.int64)

    def grads(loss, draws=300):
        z = x.clone().requires_grad_()
        (of_mean,) = torch.autograd.grad(loss(eot(net, draws)(z)).sum(), z)
        single = [torch.autograd.grad(loss(net(z)).sum(), z)[0] for _ in range(draws)]
        return of_mean, torch.stack(single).mean(0)

    assert torch.allclose(*grads(lambda out: out[:, 0] - out[:, 1]), atol=1e-5)
    of_mean, mean_of_grads = grads(lambda out: nn.functional.cross_entropy(out, y, reduction="none"))
    assert (of_mean - mean_of_grads).norm() > 0.1 * mean_of_grads.norm()


def test_batches_are_bounded_and_their_graphs_are_not_stored():
    net, x, weight = NoisyLinear(), torch.rand(3, 4), torch.randn(3, 3)
    value_and_vjp(eot(net, 7), x, weight)
    assert net.calls == [(21, True)]
    net.calls.clear()
    saved_sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved_sizes.append(t.numel()) or t, lambda t: t):
        eot(lambda z: net(z).exp().exp().exp(), 300, most=90)(x.clone().requires_grad_())
    assert [rows for rows, _ in net.calls] == [90] * 10
    assert sum(saved_sizes) < 3000  # the graph of all draws saves three times 2,700 numbers
    net.calls.clear()
    value_and_vjp(eot(net, 7, most=8), x, weight)
    assert [rows for rows, _ in net.calls] == [
        8,
        8,
        5,
        5,
        8,
        8,
    ]  # forward pass, then recomputed in the backward pass, last first
    net.calls.clear()
    with torch.no_grad():
        eot(net, 7, most=8)(x)
    assert net.calls == [(8, False), (8, False), (5, False)]


def test_recomputation_repeats_the_draws_of_all_generators_and_restores_their_states():
    x, weight = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    after = []
    for most in (15, 4):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        factors = []

        def recorded(z, factors=factors):
            factors.append(factors_of_three_generators(len(z)))
            return torch.sin(z * factors[-1])

        _, grad = value_and_vjp(eot(recorded, 5, most=most), x, weight)
        first, repeated = (factors, factors) if most == 15 else (factors[:4], factors[:3:-1])
        assert all(map(torch.equal, first, repeated))
        assert len(first) == len(repeated)
        factor = torch.cat(first).reshape(3, 5, 1)
        assert torch.allclose(grad, weight * (factor * torch.cos(x[:, None] * factor)).mean(1))
        after.append(factors_of_three_generators(1) - torch.rand(1))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for rows in (4, 4, 4, 3):
        factors_of_three_generators(rows)
    assert torch.equal(after[-1], factors_of_three_generators(1) - torch.rand(1))


def test_a_function_with_its_own_generator_is_not_recomputed():
    generator, x, weight = np.random.default_rng(0), torch.rand(3, 4), torch.randn(3, 4)
    factors = []

    def noisy(z):
        factors.append(torch.tensor(generator.random(len(z)), dtype=z.dtype)[:, None])
        return z * factors[-1]

    _, grad = value_and_vjp(eot(noisy, 4, most=5), x, weight)
    assert [len(part) for part in factors] == [5, 5, 2]
    assert torch.allclose(grad, weight * torch.cat(factors).reshape(3, 4).mean(1, keepdim=True))


def test_mean_probability_has_the_loss_of_soft_voting():
    outs, y = torch.randn(6, 5, 3, dtype=torch.float64) * 4, torch.tensor([0, 1, 2, 0, 1])
    vote = torch.zeros(5, dtype=torch.float64)
    for out in outs:
        vote += out.softmax(1)[torch.arange(5), y] / 6
    loss = nn.functional.cross_entropy(mean_probability(outs), y, reduction="none")
    assert torch.allclose(loss, -vote.log())
    torch.manual_seed(0)
    averaged = eot(squashed, 6, mean_probability)(torch.ones(2, 3))
    torch.manual_seed(0)
    expected = squashed(torch.ones(12, 3)).reshape(2, 6, 3).softmax(2).mean(1).log()
    assert torch.allclose(averaged, expected, atol=1e-6)
    torch.manual_seed(0)
    plain = eot(squashed, 6, mean_output)(torch.ones(2, 3))
    torch.manual_seed(0)
    assert torch.equal(plain, eot(squashed, 6)(torch.ones(2, 3)))
    assert not torch.allclose(plain.softmax(1), expected.exp(), atol=1e-4)


def test_eot_and_bpda_can_be_composed_both_ways():
    torch.manual_seed(0)
    x, weight = torch.rand(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def noisy_rounding(z):
        return rounded(z + torch.rand_like(z) * 0.2)

    for most in (1000, 7):
        torch.manual_seed(5)
        out, grad = value_and_vjp(eot(bpda(noisy_rounding, cubic), 6, most=most), x, weight)
        torch.manual_seed(5)
        assert torch.equal(out, eot(noisy_rounding, 6, most=most)(x))
        assert torch.allclose(grad, weight * 3 * x**2)
    out, grad = value_and_vjp(bpda(rounded, eot(squashed, 6)), x, weight)
    assert torch.equal(out, rounded(x))


def test_as_a_view_it_is_differentiated_and_success_is_evaluated_on_the_function():
    torch.manual_seed(0)
    net = NoisyLinear(sigma=0.02)
    x, target = torch.rand(6, 4), Target(net, views={"eot": eot(net, 5)}, stochastic=True)
    y = (x @ net.weight.T).argmax(1)
    result = PGD(steps=3)(target, x, y, threat=Linf(0.3))
    rows = [rows for rows, _ in net.calls]
    assert rows.count(30) == 3  # the views of three steps; all other calls evaluate six examples
    assert set(rows) == {30, 6}
    assert torch.equal(result.success, result.rate > 0.5)


def test_an_average_can_be_pickled_and_copied_and_its_module_is_found():
    net = NoisyLinear()
    view, x = eot(net, 3, mean_probability, most=2), torch.rand(2, 4)
    assert module_of(view) is net
    outs = []
    for twin in (view, pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        torch.manual_seed(0)
        outs.append(twin(x))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_an_empty_batch_gives_an_empty_output():
    assert eot(NoisyLinear(), 5)(torch.rand(0, 4)).shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fn", {"fn": 0.5}),
        ("reduce", {"reduce": "mean"}),
        ("draws", {"draws": 0}),
        ("draws", {"draws": 2.0}),
        ("draws", {"draws": True}),
        ("most", {"most": 0}),
        ("most", {"most": None}),
    ],
)
def test_invalid_arguments_of_eot_are_refused(name, arguments):
    with pytest.raises(ArgumentError, match=f"^{name}="):
        eot(**{"fn": rounded, "draws": 3} | arguments)


@pytest.mark.parametrize("fn", [lambda x: (x, x), lambda x: x.sum(), lambda x: x[:1]])
def test_outputs_without_one_row_per_example_are_refused(fn):
    with pytest.raises(ShapeError, match="one tensor with a row for each"):
        eot(fn, 3)(torch.rand(2, 4))
