import pytest
import torch
from torch import nn

from robustkit._engine.jacobian import Jacobian
from robustkit._engine.layers import flat_output, layers_of, truncate_after
from robustkit.errors import ArgumentError

torch.manual_seed(0)


class StraightThrough(torch.autograd.Function):
    """Rounds, with the identity as backward and without forward-mode differentiation."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.slow
@pytest.mark.parametrize(
    "fn", [lambda x: (x @ W).tanh(), lambda x: StraightThrough.apply(3 * x @ W)], ids=["tanh", "no forward rule"]
)
def test_products_equal_those_with_the_full_jacobian(fn):
    x = torch.randn(5, 4, dtype=torch.float64)
    costs = []
    jacobian = Jacobian(fn, x, lambda *cost: costs.append(cost))
    full = [torch.autograd.functional.jacobian(lambda row: fn(row[None])[0], row) for row in x]
    tangent, cotangent = torch.randn(1, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(jacobian.jvp(tangent), torch.stack([matrix @ tangent[0] for matrix in full]), atol=1e-12)
    assert torch.allclose(
        jacobian.vjp(cotangent), torch.stack([u @ matrix for u, matrix in zip(cotangent, full, strict=True)]), atol=1e-12
    )
    assert [cost[:2] for cost in costs] == [(1, 0), (1, 0), (0, 1)]
    assert not costs[2][2].any()


W = torch.randn(4, 3, dtype=torch.float64)


class Branching(nn.Module):
    """Nested layers, one that never runs, one with two outputs, and one that works in place."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
        self.idle = nn.Linear(4, 4)
        self.pair = nn.LSTM(5, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.pair(self.stem(x)[:, None])[0][:, 0])


def test_layers_of_lists_the_layers_that_run_and_return_one_tensor():
    net, x = Branching(), torch.randn(2, 4)
    assert list(layers_of(net, net, x)) == ["stem.0", "stem.1", "stem", "head"]
    assert list(layers_of(None, net, x)) == []
    assert not any(part._forward_hooks for part in net.modules())


def test_the_output_of_a_layer_is_taken_before_later_layers_overwrite_it():
    net, x = Branching(), torch.randn(6, 4)
    assert torch.equal(truncate_after(net.stem[0], net)(x), net.stem[0](x))
    assert float(net.stem[0](x).detach().min()) < 0
    with pytest.raises(ArgumentError, match="did not run"):
        truncate_after(net.idle, net)(x)
    assert not any(part._forward_hooks for part in net.modules())


def test_several_output_tensors_are_flattened_to_one_matrix():
    x = torch.randn(4, 3, dtype=torch.float64)
    jacobian = Jacobian(flat_output(lambda x: (x.square(), x.sum(1), x.argmax(1))), x, lambda *cost: None)
    tangent = torch.randn(1, 3, dtype=torch.float64)
    assert torch.allclose(jacobian.jvp(tangent), torch.cat([2 * x * tangent, tangent.sum().expand(4, 1)], 1))
