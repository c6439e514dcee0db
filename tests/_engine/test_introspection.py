"""A model is found and frozen however it is wrapped."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import PGD, Linf, Target
from robustkit._engine.introspection import generators_of, module_of

X = torch.rand(4, 3)
Y = torch.zeros(4, dtype=torch.int64)


def net():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train()


class Holder:
    def __init__(self, model):
        self.model = model

    def __call__(self, x):
        return self.model(x)

    def predict(self, x):
        return self.model(x)


def deeper(model):
    def inner(x):
        return model(x)

    def outer(x):
        return inner(x)

    return outer


def decorated(model):
    @functools.wraps(model.forward)
    def call(x):
        return model(x)

    return call


def run(model, x):
    return model(x)


def default(model):
    def call(x, model=model):
        return model(x)

    return call


WRAPPERS = {
    "itself": lambda m: m,
    "bound method": lambda m: m.forward,
    "object": Holder,
    "method of an object": lambda m: Holder(m).predict,
    "partial": lambda m: functools.partial(run, m),
    "partial by name": lambda m: functools.partial(lambda x, f: f(x), f=m),
    "lambda over an attribute": lambda m: (lambda holder: lambda x: holder.model(x))(Holder(m)),
    "list": lambda m: (lambda models: lambda x: sum(f(x) for f in models))([m]),
    "dict": lambda m: (lambda models: lambda x: models["a"](x))({"a": m}),
    "closure in a closure": deeper,
    "decorated": decorated,
    "default argument": default,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_is_found_and_its_statistics_are_restored(wrap):
    model = net()
    target = wrap(model)
    assert module_of(target) is model
    result = PGD(steps=2)(target, X, Y, threat=Linf(0.1))
    assert torch.equal(model[1].running_mean, torch.zeros(2))
    assert model[1].training
    assert [flag.name for flag in result.flags] == ["train-mode"]


def test_modules_of_views_are_found_too():
    model, view = net(), net()
    target = Target(model, views={"surrogate": lambda x: view(x)})
    assert set(target.module) == {model, view}
    PGD(steps=2)(target, X, Y, threat=Linf(0.1))
    assert torch.equal(view[1].running_mean, torch.zeros(2))


def test_a_submodule_of_a_found_module_is_not_listed_again():
    model = net()
    assert module_of(lambda x: model[1](model(x))) is model
    assert module_of(torch.sin) is None


def test_generators_are_found():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.inner = torch.Generator(), nn.Identity()
            self.inner.rng = np.random.default_rng(0)

    noisy, python = Noisy(), random.Random(0)
    assert set(map(id, generators_of(noisy))) == {id(noisy.generator), id(noisy.inner.rng)}
    assert generators_of(lambda x: python.random()) == [python]


def test_two_models_in_evaluation_mode_raise_no_train_mode_flag():
    first, second = net().eval(), net().eval()
    result = PGD(steps=1)(lambda x: first(x) + second(x), X, Y, threat=Linf(0.1))
    assert result.flags == ()
    assert not first.training
    second.train()
    result = PGD(steps=1)(lambda x: first(x) + second(x), X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == ["train-mode"]
