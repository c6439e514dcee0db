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
    """n different matrices, as the Jacobians of one function at n points: the k-th row goes through the k-th matrix."""
    matrices = torch.randn(n, out, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def fn(x):
        return torch.einsum("noi,ni->no", matrices, x) + 3

    return matrices, [Jacobian(fn, torch.zeros(n, inside, dtype=torch.float64), lambda *cost: None)]


def start(inside, seed=0):
    return torch.randn(1, inside, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(matrices, change, q):
    return float((matrices @ change[0]).abs().pow(q).sum() ** (1 / q))


@pytest.mark.parametrize("p", [Linf, L2])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0, 5.0, 10.0])
def test_the_objective_never_falls_and_is_what_is_told(p, q):
    for seed in range(20):
        matrices, jacobians = linear(seed, 3, 4, 6)
        change, reached = power_method(jacobians, BALLS[p], start(6, seed), q, 100)
        assert reached[-1] == pytest.approx(objective(matrices, change, q), rel=1e-9)
        assert all(later >= earlier * (1 - 1e-12) for earlier, later in pairwise(reached))


def test_for_p_and_q_of_two_it_is_the_singular_value():
    for seed in range(10):
        matrices, jacobians = linear(seed, 3, 4, 6)
        _, values, right = torch.linalg.svd(matrices.reshape(12, 6))
        best = max((power_method(jacobians, BALLS[L2], start(6, s), 2.0, 300) for s in range(3)), key=lambda end: end[1][-1])
        assert best[1][-1] == pytest.approx(float(values[0]), rel=2e-3)
        assert float((best[0][0] @ right[0]).abs()) > 0.97


@pytest.mark.parametrize("q", [2.0, 5.0, 10.0])
def test_for_p_of_infinity_the_best_of_some_starts_is_the_best_of_all_signs(q):
    for seed in range(5):
        matrices, jacobians = linear(seed, 2, 3, 8)
        truth = max(
            objective(matrices, torch.tensor([signs], dtype=torch.float64), q) for signs in product((-1.0, 1.0), repeat=8)
        )
        ends = [power_method(jacobians, BALLS[Linf], start(8, s), q, 100)[1][-1] for s in range(40)]
        assert max(ends) == pytest.approx(truth, rel=1e-9)
        assert min(ends) <= truth


def test_batches_of_examples_are_one_sum():
    matrices, (whole,) = linear(0, 4, 3, 5)
    halves = [
        Jacobian(
            lambda x, part=part: torch.einsum("noi,ni->no", part, x), torch.zeros(2, 5, dtype=torch.float64), lambda *cost: None
        )
        for part in (matrices[:2], matrices[2:])
    ]
    one, other = (power_method(jacobians, BALLS[L2], start(5), 5.0, 30) for jacobians in ([whole], halves))
    assert torch.allclose(one[0], other[0], atol=1e-12)


def test_huge_and_tiny_jacobians_neither_overflow_nor_vanish():
    for scale in (1e30, 1e-30):
        jacobians = [Jacobian(lambda x, s=scale: s * x, torch.zeros(2, 4), lambda *cost: None)]
        change, reached = power_method(jacobians, BALLS[Linf], torch.ones(1, 4), 10.0, 5)
        assert reached[-1] == pytest.approx(scale * 8 ** (1 / 10), rel=1e-5)
        assert torch.equal(change, torch.ones(1, 4))


def test_a_layer_that_does_not_move_ends_at_once():
    jacobians = [Jacobian(lambda x: 0 * x, torch.zeros(2, 4), lambda *cost: None)]
    assert power_method(jacobians, BALLS[L2], torch.ones(1, 4), 10.0, 5)[1] == [0.0]


torch.manual_seed(1)  # before the net, which would else depend on which tests were imported first
NET = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
X = torch.rand(30, 6) * 0.2 + 0.4
OWN = NET(X).argmax(1)


def test_the_named_layer_is_the_one_whose_singular_vector_comes_out():
    """The first layer is linear: its Jacobian is its weight, whose largest right singular vector is known."""
    made = UniversalSingular(layer="0", q=2.0, iterations=200).learn(NET, X, OWN, threat=L2(0.05))
    right = torch.linalg.svd(NET[0].weight.detach()).Vh[0]
    assert float((made.delta[0] @ right).abs()) == pytest.approx(0.05, rel=1e-2)


def test_the_sign_is_the_one_that_fools_more():
    for goal, ref in ((None, OWN), (ClassifyAs(), torch.full_like(OWN, 1))):
        more = {"goal": goal} if goal else {}
        made = UniversalSingular(layer="2").learn(NET, X, ref, threat=Linf(0.3), **more)
        fooled = [(NET(X + sign * made.delta).argmax(1) == ref).float().mean() for sign in (1, -1)]
        fooled = [1 - rate for rate in fooled] if goal is None else fooled
        assert fooled[0] >= fooled[1]


def test_without_a_name_the_best_layer_is_taken():
    def fooled(layer):
        made = UniversalSingular(layer=layer).learn(NET, X, OWN, threat=Linf(0.1), seed=2)
        return float((NET((X + made.delta).clamp(0, 1)).argmax(1) != OWN).float().mean())

    assert fooled(None) == max(fooled(name) for name in ("0", "1", "2"))


def test_a_function_without_layers_is_served_by_its_output():
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    result = UniversalSingular()(lambda x: x @ weight, X, (X @ weight).argmax(1), threat=Linf(0.1))
    assert result.success.shape == (30,)


def test_an_unknown_layer_is_refused_with_those_that_there_are():
    with pytest.raises(ArgumentError, match=r"layer='conv9' does not exist; this model has 0, 1, 2"):
        UniversalSingular(layer="conv9").learn(NET, X, OWN, threat=Linf(0.1))
    with pytest.raises(ArgumentError, match=r"q=0\.5 must be at least 1"):
        UniversalSingular(q=0.5)


class Older(torch.autograd.Function):
    """Rounds, straight through; of the form that torch.func refuses."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_straight_through_function_of_the_older_form_is_served():
    plain = UniversalSingular(layer="2").learn(NET, X, OWN, threat=Linf(0.1), seed=1)

    class Rounds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = NET

        def forward(self, x):
            return self.net(Older.apply(x * 1e4) / 1e4)

    rounds = UniversalSingular(layer="net.2").learn(Rounds().eval(), X, OWN, threat=Linf(0.1), seed=1)
    assert torch.equal(rounds.delta, plain.delta)


def test_of_the_two_signs_the_one_comes_back_that_fools_more():
    """Two linear classes beside each other: a change helps in one direction and does nothing in the other."""
    net = nn.Sequential(nn.Linear(4, 2, bias=False)).eval()
    net[0].load_state_dict({"weight": torch.tensor([[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])})
    for side in (1, -1):
        x = side * 0.05 * torch.ones(20, 4)
        made = UniversalSingular(layer="0").learn(net, x, net(x).argmax(1), threat=Linf(0.2, bounds=None))
        assert torch.allclose(made.delta, -side * torch.full((1, 4), 0.2))
