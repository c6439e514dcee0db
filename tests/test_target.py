import contextlib
import functools

import pytest
import torch
from torch import nn

from robustkit import Target
from robustkit.errors import ArgumentError


class Enencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))

    def encode(self, x):
        return self.inner(x)


def test_the_module_of_a_bound_method_or_a_wrapper_is_found():
    encoder = Enencoder()
    assert Target(encoder.inner).module is encoder.inner
    assert Target(encoder.encode).module is encoder
    assert Target(lambda x: x).module is None
    assert Target(lambda x: x, module=encoder).module is encoder
    assert Target(lambda x: encoder.encode(x)).module is encoder
    other, encode = Enencoder(), encoder.encode
    assert set(Target(lambda x: other.encode(encode(x))).module) == {other, encoder}
    assert Target(functools.partial(encoder.encode)).module is encoder
    target = Target(encoder.encode)
    assert Target.of(target) is target


@pytest.mark.parametrize(("mode", "training"), [("eval", [False] * 5), ("train", [True] * 5)])
def test_frozen_sets_the_mode_and_freezes_the_parameters_and_restores_both(mode, training):
    encoder = Enencoder()
    encoder.inner[1].eval()
    encoder.inner[0].bias.requires_grad_(False)
    parts, parameters = list(encoder.modules()), list(encoder.parameters())
    before = [p.training for p in parts], [p.requires_grad for p in parameters]
    with contextlib.suppress(KeyError), Target(encoder, mode=mode).frozen():
        assert [p.training for p in parts] == training
        assert not any(p.requires_grad for p in parameters)
        encoder.inner(torch.rand(4, 2))  # in training mode this moves the running statistics
        raise KeyError
    assert ([p.training for p in parts], [p.requires_grad for p in parameters]) == before
    assert torch.equal(encoder.inner[2].running_mean, torch.zeros(2))
    assert int(encoder.inner[2].num_batches_tracked) == 0


def test_as_is_leaves_the_mode_alone():
    encoder = Enencoder()
    encoder.inner[1].eval()
    with Target(encoder, mode="as-is").frozen():
        assert [p.training for p in encoder.modules()] == [True, True, True, False, True]


def test_frozen_does_not_write_to_buffers_that_a_graph_needs():
    norm = nn.BatchNorm1d(2).eval()
    loss = norm(torch.rand(3, 2, requires_grad=True)).sum()
    with Target(norm).frozen():
        norm(torch.rand(3, 2))
    loss.backward()  # would raise if a saved buffer had been written


def test_views():
    target = Target(torch.sin, views={"flat": torch.zeros_like, "cos": torch.cos})
    assert target.view is torch.zeros_like
    assert target.with_view("cos").view is torch.cos
    assert dict(Target(torch.sin).views) == {"exact": torch.sin}
    with pytest.raises(ArgumentError, match="'tan' does not exist; this target has flat, cos"):
        target.with_view("tan")


@pytest.mark.parametrize("arguments", [{"fn": None}, {"mode": "test"}, {"draws": 0}, {"batch_size": 0.5}])
def test_invalid_arguments_are_refused(arguments):
    with pytest.raises(ArgumentError, match=next(iter(arguments))):
        Target(**{"fn": torch.sin, **arguments})


def test_targets_can_be_copied_and_pickled():
    import copy
    import pickle

    net = nn.Linear(2, 2)
    target = Target(net, views={"other": torch.sin}, batch_size=3, stochastic=False)
    for twin in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert twin.fn is twin.module
        assert torch.equal(twin.fn.weight, net.weight)
        assert twin.batch_size == 3
        assert twin.view is torch.sin
