import contextlib
import functools

import pytest
import torch
from torch import nn

from robustkit import Target
from robustkit.errors import ArgumentError


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))

    def encode(self, x):
        return self.inner(x)


def test_the_module_is_found_behind_a_bound_method():
    coder = Coder()
    assert Target(coder.inner).module is coder.inner
    assert Target(coder.encode).module is coder
    assert Target(lambda x: x).module is None
    assert Target(lambda x: x, module=coder).module is coder
    assert Target(lambda x: coder.encode(x)).module is coder
    other, encode = Coder(), coder.encode
    assert set(Target(lambda x: other.encode(encode(x))).module) == {other, coder}
    assert Target(functools.partial(coder.encode)).module is coder
    target = Target(coder.encode)
    assert Target.of(target) is target


@pytest.mark.parametrize(("mode", "training"), [("eval", [False] * 5), ("train", [True] * 5)])
def test_held_sets_the_mode_freezes_the_parameters_and_restores_both_part_by_part(mode, training):
    coder = Coder()
    coder.inner[1].eval()
    coder.inner[0].bias.requires_grad_(False)
    parts, parameters = list(coder.modules()), list(coder.parameters())
    before = [p.training for p in parts], [p.requires_grad for p in parameters]
    with contextlib.suppress(KeyError), Target(coder, mode=mode).frozen():
        assert [p.training for p in parts] == training
        assert not any(p.requires_grad for p in parameters)
        coder.inner(torch.rand(4, 2))  # in training mode this moves the running statistics
        raise KeyError
    assert ([p.training for p in parts], [p.requires_grad for p in parameters]) == before
    assert torch.equal(coder.inner[2].running_mean, torch.zeros(2))
    assert int(coder.inner[2].num_batches_tracked) == 0


def test_as_is_leaves_the_mode_alone():
    coder = Coder()
    coder.inner[1].eval()
    with Target(coder, mode="as-is").frozen():
        assert [p.training for p in coder.modules()] == [True, True, True, False, True]


def test_held_does_not_touch_buffers_that_a_graph_still_needs():
    norm = nn.BatchNorm1d(2).eval()
    loss = norm(torch.rand(3, 2, requires_grad=True)).sum()
    with Target(norm).frozen():
        norm(torch.rand(3, 2))
    loss.backward()  # would raise had a saved buffer been written


def test_views():
    target = Target(torch.sin, views={"flat": torch.zeros_like, "cos": torch.cos})
    assert target.view is torch.zeros_like
    assert target.seen("cos").view is torch.cos
    assert dict(Target(torch.sin).views) == {"exact": torch.sin}
    with pytest.raises(ArgumentError, match="'tan' does not exist; this target has flat, cos"):
        target.seen("tan")


@pytest.mark.parametrize("change", [{"fn": None}, {"mode": "test"}, {"draws": 0}, {"batch_size": 0.5}])
def test_senseless_targets_are_refused(change):
    with pytest.raises(ArgumentError, match=next(iter(change))):
        Target(**{"fn": torch.sin, **change})


def test_targets_are_copied_and_pickled_for_workers():
    import copy
    import pickle

    net = nn.Linear(2, 2)
    target = Target(net, views={"other": torch.sin}, batch_size=3, stochastic=False)
    for twin in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        assert twin.fn is twin.module
        assert torch.equal(twin.fn.weight, net.weight)
        assert twin.batch_size == 3
        assert twin.view is torch.sin
