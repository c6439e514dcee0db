"""A guarded target is the defence followed by the target: function, views in order, both modules frozen."""

import copy
import pickle

import pytest
import torch
from torch import nn

from robustkit import PGD, Linf, Target
from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.errors import ArgumentError


class Scale(Defence):
    """Multiplies by a parameter and, if noisy, adds noise; the view "smooth" is a separate function."""

    def __init__(self, factor, noisy=False):
        super().__init__()
        self.factor, self.drop = nn.Parameter(torch.tensor(float(factor))), nn.Dropout(0.5)
        self.stochastic = noisy

    def forward(self, x, noise=None):
        if not self.stochastic:
            return self.drop(x * self.factor)
        uniform = torch.rand(x.shape) if noise is None else noise.uniform(*x.shape[1:])
        return x * self.factor + uniform

    def smooth(self, x):
        return x * self.factor * 10

    def views(self):
        return {"smooth": self.smooth, "exact": self.forward}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).eval()


def gradient(view, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(view(x).sum(), x)[0]


def test_a_guarded_target_is_the_defence_followed_by_the_target(net):
    x, scale = torch.rand(4, 6), Scale(2.0).eval()
    target = scale.guard(net)
    assert torch.equal(target.fn(x), net(x * 2))
    assert list(target.views) == ["smooth", "exact"]
    assert torch.allclose(target.view(x), net(x * 20))
    assert torch.allclose(gradient(target.view, x), 10 * gradient(target.views["exact"], x))
    assert torch.allclose(gradient(target.views["exact"], x), 2 * net[1].weight.sum(0).expand(4, -1))
    assert target.views["exact"] is target.fn  # so that one pass serves both the gradient and the evaluation


def test_views_of_both_are_composed_and_the_first_is_the_first_of_each(net):
    x, scale = torch.rand(4, 6), Scale(2.0).eval()
    inner = Target(
        net,
        views={"bpda": lambda z: net(z) * 3, "exact": net},
        mode="as-is",
        batch_size=7,
        draws=3,
        stochastic=False,
        features=net[0],
    )
    target = scale.guard(inner, draws=2)
    assert list(target.views) == ["smooth/bpda", "smooth/exact", "exact/bpda", "exact/exact"]
    for name, factor in zip(target.views, (20 * 3, 20, 2 * 3, 2), strict=True):
        assert torch.allclose(gradient(target.views[name], x), factor * gradient(net, x)), name
    assert target.views["exact/exact"] is not inner.fn
    assert (target.mode, target.batch_size, target.draws, target.stochastic) == ("as-is", 7, 3, False)
    assert torch.equal(target.features(x), x * 2)
    assert scale.guard(inner, draws=5).draws == 5


def test_guards_can_be_nested_and_the_outer_one_is_applied_first(net):
    x = torch.rand(4, 6)
    twice = Scale(2.0).eval().guard(Scale(5.0).eval().guard(net))
    assert torch.allclose(twice.fn(x), net(x * 10))
    assert list(twice.views) == ["smooth/smooth", "smooth/exact", "exact/smooth", "exact/exact"]
    assert torch.allclose(twice.view(x), net(x * 1000), rtol=1e-4)
    assert len(list(twice.module.parameters())) == 4


@pytest.mark.parametrize(
    ("defence", "inner", "expected"),
    [
        (Scale(1.0, noisy=True), None, True),
        (Scale(1.0, noisy=True), False, True),
        (Scale(1.0), None, None),
        (Scale(1.0), False, False),
        (Scale(1.0), True, True),
    ],
)
def test_a_guarded_target_is_stochastic_if_either_part_is(net, defence, inner, expected):
    assert defence.guard(Target(net, stochastic=inner)).stochastic is expected


def test_defence_and_model_are_frozen_and_restored(net):
    scale, x, y = Scale(1.0).train(), torch.rand(8, 6), torch.zeros(8, dtype=torch.int64)
    net.train()
    result = PGD(steps=3)(scale.guard(net), x, y, threat=Linf(0.1))
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)  # without the dropout, so repeatable
    assert scale.training
    assert scale.drop.training
    assert scale.factor.requires_grad
    assert scale.factor.grad is None
    assert [flag.name for flag in result.flags] == ["train-mode"]
    scale.eval()
    net.eval()
    assert not PGD(steps=1)(scale.guard(net), x, y, threat=Linf(0.1)).flags  # a container of modules has no mode of its own


def test_a_function_without_a_module_can_be_guarded():
    scale = Scale(2.0).eval()
    target = scale.guard(lambda z: z.flatten(1)[:, :2])
    assert target.module is scale
    assert torch.equal(target.fn(torch.ones(1, 3)), torch.full((1, 2), 2.0))


def test_a_guarded_target_can_be_pickled_and_copied(net):
    x, target = torch.rand(4, 6), Scale(2.0).eval().guard(net)
    for twin in (pickle.loads(pickle.dumps(target)), copy.deepcopy(target)):
        assert torch.equal(twin.fn(x), target.fn(x))
        assert list(twin.views) == list(target.views)


def test_a_defence_without_views_cannot_be_created():
    class NoViews(Defence):
        def forward(self, x, noise=None):
            return x

    with pytest.raises(TypeError, match="views"):
        NoViews()


@pytest.mark.parametrize("views", [{}, {"exact": None}, [bpda]])
def test_invalid_views_are_refused(net, views):
    class WrongViews(Defence):
        def forward(self, x, noise=None):
            return x

        def views(self):
            return views

    with pytest.raises(ArgumentError, match="it must return a dict of functions"):
        WrongViews().guard(net)


@pytest.mark.parametrize("draws", [0, -1, 1.5, "2"])
def test_draws_below_one_are_refused(net, draws):
    with pytest.raises(ArgumentError, match="draws"):
        Scale(1.0).guard(net, draws=draws)


def test_a_defence_is_not_a_detector_by_default():
    assert Scale(1.0).score(torch.rand(2, 6)) is None
    assert Scale(1.0).decoder is None
