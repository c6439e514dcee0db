import pytest
import torch
from torch import nn

from robustkit._engine.jacobian import Jacobian
from robustkit._engine.layers import joined, layers_of, up_to
from robustkit.errors import ArgumentError

torch.manual_seed(0)


class Straight(torch.autograd.Function):
    """Rounds; has a backward, but no forward differentiation."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize("fn", [lambda x: (x @ W).tanh(), lambda x: Straight.apply(3 * x @ W)], ids=["tanh", "no forward rule"])
def test_products_are_those_with_the_whole_jacobian(fn):
    x = torch.randn(5, 4, dtype=torch.float64)
    costs = []
    jacobian = Jacobian(fn, x, lambda *cost: costs.append(cost))
    whole = [torch.autograd.functional.jacobian(lambda row: fn(row[None])[0], row) for row in x]
    change, weight = torch.randn(1, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(jacobian.push(change), torch.stack([part @ change[0] for part in whole]), atol=1e-12)
    assert torch.allclose(
        jacobian.pull(weight), torch.stack([w @ part for w, part in zip(weight, whole, strict=True)]), atol=1e-12
    )
    assert [cost[:2] for cost in costs] == [(1, 0), (1, 0), (0, 1)]
    assert not costs[2][2].any()


W = torch.randn(4, 3, dtype=torch.float64)


class Branching(nn.Module):
    """Layers inside layers, one that never runs, one that gives a pair, one that writes to what it is given."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True))
        self.idle = nn.Linear(4, 4)
        self.pair = nn.LSTM(5, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.pair(self.stem(x)[:, None])[0][:, 0])


def test_layers_are_those_that_run_and_give_one_tensor():
    net, x = Branching(), torch.randn(2, 4)
    assert list(layers_of(net, net, x)) == ["stem.0", "stem.1", "stem", "head"]
    assert list(layers_of(None, net, x)) == []
    assert not any(part._forward_hooks for part in net.modules())


def test_a_layer_is_heard_before_anybody_writes_over_what_it_said():
    net, x = Branching(), torch.randn(6, 4)
    assert torch.equal(up_to(net.stem[0], net)(x), net.stem[0](x))
    assert float(net.stem[0](x).detach().min()) < 0
    with pytest.raises(ArgumentError, match="did not run"):
        up_to(net.idle, net)(x)
    assert not any(part._forward_hooks for part in net.modules())


def test_an_output_of_several_tensors_is_one_matrix():
    x = torch.randn(4, 3, dtype=torch.float64)
    jacobian = Jacobian(joined(lambda x: (x.square(), x.sum(1), x.argmax(1))), x, lambda *cost: None)
    change = torch.randn(1, 3, dtype=torch.float64)
    assert torch.allclose(jacobian.push(change), torch.cat([2 * x * change, change.sum().expand(4, 1)], 1))
