"""The values are those of one function and the derivatives those of another, exactly, in every mode that torch has."""

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


class NoisyLinear(nn.Module):
    """W (x + sigma noise): a row draws for itself. It notes how many rows it was given."""

    def __init__(self, sigma=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
        self.sigma, self.calls = sigma, []

    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        return (x + self.sigma * torch.randn_like(x)) @ self.weight.T


def squashed(x):
    """A random function that is not linear: the gradient of the mean differs from row to row and from draw to draw."""
    return torch.tanh(3 * x * torch.rand_like(x)).cumsum(1)


def numbers_of_three(n):
    """A factor for each row made of random numbers of torch, numpy and Python."""
    factors = torch.rand(n) + torch.tensor(np.random.rand(n)) + torch.tensor([random.random() for _ in range(n)])
    return factors.double()[:, None]


def pull(view, x, weight):
    """Value of the view and the derivative of its weighted sum."""
    x = x.clone().requires_grad_()
    out = view(x)
    return out.detach(), torch.autograd.grad((out * weight).sum(), x)[0]


def test_the_mean_of_noise_on_a_linear_model_is_known_in_closed_form():
    torch.manual_seed(0)
    net, x, weight = NoisyLinear(), torch.rand(5, 4), torch.randn(5, 3)
    out, grad = pull(eot(net, 40_000), x, weight)
    # Each output is normal with the standard deviation sigma |w_j| / sqrt(draws); five of them are a bound.
    bound = 5 * net.sigma * net.weight.detach().norm(dim=1) / 200
    assert ((out - x @ net.weight.detach().T).abs() < bound).all()
    assert torch.allclose(grad, weight @ net.weight.detach(), atol=1e-5)  # noise that is added leaves no trace in it
    torch.manual_seed(7)
    drawn = torch.randn(20, 4)  # the noise of the draws, side by side for each example
    torch.manual_seed(7)
    expected = (x + 0.5 * drawn.reshape(5, 4, 4).mean(1)) @ net.weight.T
    assert torch.allclose(eot(net, 4)(x), expected, atol=1e-6)


@pytest.mark.parametrize("most", [1000, 21, 5, 1])
def test_value_and_gradient_are_the_means_of_single_draws(most):
    x, weight = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    torch.manual_seed(3)
    out, grad = pull(eot(squashed, 7, most=most), x, weight)
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


def test_for_a_loss_linear_in_the_output_it_is_what_averaged_gradients_are():
    """Target(draws=k) averages gradients; where the loss is linear the two agree, else they do not."""
    torch.manual_seed(0)
    net, x, y = NoisyLinear(sigma=1.0), torch.rand(400, 4), torch.zeros(400, dtype=torch.int64)

    def grads(loss, draws=300):
        z = x.clone().requires_grad_()
        (one,) = torch.autograd.grad(loss(eot(net, draws)(z)).sum(), z)
        many = [torch.autograd.grad(loss(net(z)).sum(), z)[0] for _ in range(draws)]
        return one, torch.stack(many).mean(0)

    assert torch.allclose(*grads(lambda out: out[:, 0] - out[:, 1]), atol=1e-5)
    one, many = grads(lambda out: nn.functional.cross_entropy(out, y, reduction="none"))
    assert (one - many).norm() > 0.1 * many.norm()


def test_rows_go_through_in_goes_of_bounded_size_and_without_a_graph_of_their_own():
    net, x, weight = NoisyLinear(), torch.rand(3, 4), torch.randn(3, 3)
    pull(eot(net, 7), x, weight)
    assert net.calls == [(21, True)]
    net.calls.clear()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
        eot(lambda z: net(z).exp().exp().exp(), 300, most=90)(x.clone().requires_grad_())
    assert [rows for rows, _ in net.calls] == [90] * 10
    assert sum(held) < 3000  # the graph of all draws holds three times 2,700 numbers
    net.calls.clear()
    pull(eot(net, 7, most=8), x, weight)
    assert [rows for rows, _ in net.calls] == [8, 8, 5, 5, 8, 8]  # forwards, and again on the way back, last first
    net.calls.clear()
    with torch.no_grad():
        eot(net, 7, most=8)(x)
    assert net.calls == [(8, False), (8, False), (5, False)]


def test_a_second_go_sees_the_same_draws_of_all_generators_and_leaves_them_as_they_are():
    x, weight = torch.rand(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    after = []
    for most in (15, 4):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        factors = []

        def noted(z, factors=factors):
            factors.append(numbers_of_three(len(z)))
            return torch.sin(z * factors[-1])

        _, grad = pull(eot(noted, 5, most=most), x, weight)
        first, again = (factors, factors) if most == 15 else (factors[:4], factors[:3:-1])
        assert all(map(torch.equal, first, again))
        assert len(first) == len(again)
        by_hand = torch.cat(first).reshape(3, 5, 1)
        assert torch.allclose(grad, weight * (by_hand * torch.cos(x[:, None] * by_hand)).mean(1))
        after.append(numbers_of_three(1) - torch.rand(1))
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    for rows in (4, 4, 4, 3):
        numbers_of_three(rows)
    assert torch.equal(after[-1], numbers_of_three(1) - torch.rand(1))


def test_generators_of_its_own_are_not_wound_back_so_all_graphs_are_held():
    own, x, weight = np.random.default_rng(0), torch.rand(3, 4), torch.randn(3, 4)
    factors = []

    def noisy(z):
        factors.append(torch.tensor(own.random(len(z)), dtype=z.dtype)[:, None])
        return z * factors[-1]

    _, grad = pull(eot(noisy, 4, most=5), x, weight)
    assert [len(part) for part in factors] == [5, 5, 2]
    assert torch.allclose(grad, weight * torch.cat(factors).reshape(3, 4).mean(1, keepdim=True))


def test_mean_probability_has_the_loss_of_a_soft_vote():
    outs, y = torch.randn(6, 5, 3, dtype=torch.float64) * 4, torch.tensor([0, 1, 2, 0, 1])
    vote = torch.zeros(5, dtype=torch.float64)
    for out in outs:
        vote += out.softmax(1)[torch.arange(5), y] / 6
    loss = nn.functional.cross_entropy(mean_probability(outs), y, reduction="none")
    assert torch.allclose(loss, -vote.log())
    torch.manual_seed(0)
    one = eot(squashed, 6, mean_probability)(torch.ones(2, 3))
    torch.manual_seed(0)
    drawn = squashed(torch.ones(12, 3)).reshape(2, 6, 3).softmax(2).mean(1).log()
    assert torch.allclose(one, drawn, atol=1e-6)
    torch.manual_seed(0)
    plain = eot(squashed, 6, mean_output)(torch.ones(2, 3))
    torch.manual_seed(0)
    assert torch.equal(plain, eot(squashed, 6)(torch.ones(2, 3)))
    assert not torch.allclose(plain.softmax(1), drawn.exp(), atol=1e-4)


def test_it_goes_with_bpda_both_ways():
    torch.manual_seed(0)
    x, weight = torch.rand(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def noisy_rounding(z):
        return rounded(z + torch.rand_like(z) * 0.2)

    for most in (1000, 7):
        torch.manual_seed(5)
        out, grad = pull(eot(bpda(noisy_rounding, cubic), 6, most=most), x, weight)
        torch.manual_seed(5)
        assert torch.equal(out, eot(noisy_rounding, 6, most=most)(x))
        assert torch.allclose(grad, weight * 3 * x**2)
    out, grad = pull(bpda(rounded, eot(squashed, 6)), x, weight)
    assert torch.equal(out, rounded(x))


def test_as_a_view_it_is_followed_and_the_function_itself_is_judged():
    torch.manual_seed(0)
    net = NoisyLinear(sigma=0.02)
    x, target = torch.rand(6, 4), Target(net, views={"eot": eot(net, 5)}, stochastic=True)
    y = (x @ net.weight.T).argmax(1)
    result = PGD(steps=3)(target, x, y, threat=Linf(0.3))
    rows = [rows for rows, _ in net.calls]
    assert rows.count(30) == 3  # the views of three steps; all else are judgements of six
    assert set(rows) == {30, 6}
    assert torch.equal(result.success, result.rate > 0.5)


def test_an_average_travels_and_what_stands_behind_it_is_found():
    net = NoisyLinear()
    view, x = eot(net, 3, mean_probability, most=2), torch.rand(2, 4)
    assert module_of(view) is net
    outs = []
    for twin in (view, pickle.loads(pickle.dumps(view)), copy.deepcopy(view)):
        torch.manual_seed(0)
        outs.append(twin(x))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_no_examples_have_no_average():
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
def test_what_cannot_be_averaged_is_refused(name, arguments):
    with pytest.raises(ArgumentError, match=f"^{name}="):
        eot(**{"fn": rounded, "draws": 3} | arguments)


@pytest.mark.parametrize("fn", [lambda x: (x, x), lambda x: x.sum(), lambda x: x[:1]])
def test_outputs_without_a_row_an_example_are_refused(fn):
    with pytest.raises(ShapeError, match="one tensor with a row for each"):
        eot(fn, 3)(torch.rand(2, 4))
