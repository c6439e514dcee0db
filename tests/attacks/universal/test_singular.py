from itertools import pairwise, product

import pytest
import torch
from torch import nn

from robustkit import L2, ClassifyAs, Linf
from robustkit._engine.jacobian import Jacobian
from robustkit.attacks import UniversalSingular
from robustkit.attacks.universal.singular import power_method
from robustkit.errors import ArgumentError

BALLS = {Linf: Linf(1.0, bounds=None), L2: L2(1.0, bounds=None)}


def linear(seed, n, out, inside):
    """n different matrices, as the Jacobians of one function at n points: row k is multiplied by matrix k."""
    matrices = torch.randn(n, out, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def fn(x):
        return torch.einsum("noi,ni->no", matrices, x) + 3

    return matrices, [Jacobian(fn, torch.zeros(n, inside, dtype=torch.float64), lambda *cost: None)]


def start(inside, seed=0):
    return torch.randn(1, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(matrices, delta, q):
    return float((matrices @ delta[0]).abs().pow(q).sum() ** (1 / q))


@pytest.mark.parametrize("p", [Linf, L2])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 5.0, 10.0])
def test_the_objective_never_decreases_and_is_returned(p, q):
    for seed in range(20):
        matrices, jacobians = linear(seed, 3, 4, 6)
        delta, objectives = power_method(jacobians, BALLS[p], start(6, seed), q, 100)
        assert objectives[-1] == pytest.approx(objective(matrices, delta, q), rel=1e-9)
        assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(objectives))


def test_for_p_and_q_of_two_it_is_the_largest_singular_value():
    for seed in range(10):
        matrices, jacobians = linear(seed, 3, 4, 6)
        _, values, right = torch.linalg.svd(matrices.reshape(12, 6))
        best = max(
            (power_method(jacobians, BALLS[L2], start(6, s), 2.0, 300) for s in range(3)), key=lambda result: result[1][-1]
        )
        assert best[1][-1] == pytest.approx(float(values[0]), rel=2e-3)
        assert float((best[0][0] @ right[0]).abs()) > 0.97


@pytest.mark.parametrize("q", [2.0, 5.0, 10.0])
def test_for_p_of_infinity_the_best_of_40_starts_is_the_best_sign_vector(q):
    for seed in range(5):
        matrices, jacobians = linear(seed, 2, 3, 8)
        truth = max(
            objective(matrices, torch.tensor([signs], dtype=torch.float64), q) for signs in product((-1.0, 1.0), repeat=8)
        )
        results = [power_method(jacobians, BALLS[Linf], start(8, s), q, 100)[1][-1] for s in range(40)]
        assert max(results) == pytest.approx(truth, rel=1e-9)
        assert min(results) <= truth


def test_batches_of_examples_are_summed():
    matrices, (whole,) = linear(0, 4, 3, 5)
    halves = [
        Jacobian(
            lambda x, part=part: torch.einsum("noi,ni->no", part, x), torch.zeros(2, 5, dtype=torch.float64), lambda *cost: None
        )
        for part in (matrices[:2], matrices[2:])
    ]
    one, other = (power_method(jacobians, BALLS[L2], start(5), 5.0, 30) for jacobians in ([whole], halves))
    assert torch.allclose(one[0], other[0], atol=1e-12)


def test_huge_and_tiny_jacobians_neither_overflow_nor_underflow():
    for scale in (1e30, 1e-30):
        jacobians = [Jacobian(lambda x, s=scale: s * x, torch.zeros(2, 4), lambda *cost: None)]
        delta, objectives = power_method(jacobians, BALLS[Linf], torch.ones(1, 4), 10.0, 5)
        assert objectives[-1] == pytest.approx(scale * 8 ** (1 / 10), rel=1e-5)
        assert torch.equal(delta, torch.ones(1, 4))


def test_a_constant_layer_ends_the_iteration_at_once():
    jacobians = [Jacobian(lambda x: 0 * x, torch.zeros(2, 4), lambda *cost: None)]
    assert power_method(jacobians, BALLS[L2], torch.ones(1, 4), 10.0, 5)[1] == [0.0]


torch.manual_seed(1)  # here, so that the net does not depend on which tests were imported first
NET = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
X = torch.rand(30, 6) * 0.2 + 0.4
PREDICTED = NET(X).argmax(1)


def test_the_singular_vector_is_that_of_the_named_layer():
    """The first layer is linear: its Jacobian is its weight, whose first right singular vector is known."""
    learned = UniversalSingular(layer="0", q=2.0, iterations=200).learn(NET, X, PREDICTED, threat=L2(0.05))
    right = torch.linalg.svd(NET[0].weight.detach()).Vh[0]
    assert float((learned.delta[0] @ right).abs()) == pytest.approx(0.05, rel=1e-2)


def test_the_sign_with_the_higher_fooling_rate_is_returned():
    for goal, ref in ((None, PREDICTED), (ClassifyAs(), torch.full_like(PREDICTED, 1))):
        options = {"goal": goal} if goal else {}
        learned = UniversalSingular(layer="2").learn(NET, X, ref, threat=Linf(0.3), **options)
        rates = [(NET(X + sign * learned.delta).argmax(1) == ref).float().mean() for sign in (1, -1)]
        rates = [1 - rate for rate in rates] if goal is None else rates
        assert rates[0] >= rates[1]


def test_without_a_name_the_best_layer_is_chosen():
    def fooling_rate(layer):
        learned = UniversalSingular(layer=layer).learn(NET, X, PREDICTED, threat=Linf(0.1), seed=2)
        return float((NET((X + learned.delta).clamp(0, 1)).argmax(1) != PREDICTED).float().mean())

    assert fooling_rate(None) == max(fooling_rate(name) for name in ("0", "1", "2"))


def test_for_a_function_without_layers_the_output_is_used():
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    result = UniversalSingular()(lambda x: x @ weight, X, (X @ weight).argmax(1), threat=Linf(0.1))
    assert result.success.shape == (30,)


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"layer='conv9' does not exist; this model has 0, 1, 2"):
        UniversalSingular(layer="conv9").learn(NET, X, PREDICTED, threat=Linf(0.1))
    with pytest.raises(ArgumentError, match=r"q=0\.5 must be at least 1"):
        UniversalSingular(q=0.5)


class OlderFunction(torch.autograd.Function):
    """A straight-through rounding in the older form of autograd.Function, which torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_autograd_function_of_the_older_form_is_supported():
    plain = UniversalSingular(layer="2").learn(NET, X, PREDICTED, threat=Linf(0.1), seed=1)

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = NET

        def forward(self, x):
            return self.net(OlderFunction.apply(x * 1e4) / 1e4)

    rounds = UniversalSingular(layer="net.2").learn(Rounds().eval(), X, PREDICTED, threat=Linf(0.1), seed=1)
    assert torch.equal(rounds.delta, plain.delta)


def test_the_sign_that_fools_is_returned():
    """Two linear classes: the perturbation fools in one direction only."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False)).eval()
    net[0].load_state_dict({"weight": torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])})
    for side in (1, -1):
        x = side * 0.05 * torch.ones(20, 4)
        learned = UniversalSingular(layer="0").learn(net, x, net(x).argmax(1), threat=Linf(0.2, bounds=None))
        assert torch.allclose(learned.delta, -side * torch.full((1, 4), 0.2))
