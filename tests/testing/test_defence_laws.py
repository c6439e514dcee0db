"""The laws hold for our defences, and each broken defence violates its law."""

import os
import sys

import pytest
import torch
from hypothesis import Phase, settings
from torch import nn

from robustkit.adaptive import bpda
from robustkit.defence import Defence
from robustkit.defences import Quantise
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.testing import check_defence
from robustkit.testing.nets import module_state


@pytest.fixture(autouse=True)
def without_shrinking():
    """Laws fail here on purpose; skip the search for the smallest case."""
    settings.register_profile("unshrunk", settings(), phases=[Phase.generate])
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])


class Plain(Defence):
    """A learned blur that obeys all laws. Its subclasses break one law each."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(1, 1, 3, padding=1), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, noise=None):
        return self.conv(x)

    def views(self):
        return {"exact": self.forward}


class Noisy(Plain):
    """A stochastic defence that obeys all laws: its noise can be given."""

    stochastic = True

    def forward(self, x, noise=None):
        return self.conv(x) + (torch.rand(x.shape) if noise is None else noise.uniform(*x.shape[1:]))


class SecretlyNoisy(Noisy):
    stochastic = False


class IgnoresNoise(Noisy):
    def forward(self, x, noise=None):
        return self.conv(x) + torch.rand(x.shape)


class Mixes(Plain):
    def forward(self, x, noise=None):
        return self.conv(x) - x.mean()


class Shrinks(Plain):
    def forward(self, x, noise=None):
        return self.conv(x)[..., 1:]


class Overflows(Plain):
    def forward(self, x, noise=None):
        return self.conv(x) / torch.zeros(())


class Detached(Plain):
    def views(self):
        return {"exact": lambda x: self.conv(x).detach() + 0 * x}


class Blind(Plain):
    def views(self):
        return {"bpda": lambda x: self.conv(x.detach()).requires_grad_()}


class NotExact(Plain):
    def views(self):
        return {"bpda": bpda(self.forward), "exact": lambda x: self.conv(x) + 1e-3}


class OtherShape(Plain):
    def views(self):
        return {"short": lambda x: self.conv(x)[:, :, 1:]}


class Steep(Plain):
    def views(self):
        return {"steep": lambda x: self.conv(x) + (x - x.detach()).abs().sqrt()}


class Counts(Plain):
    def forward(self, x, noise=None):
        self.seen.add_(1)
        return self.conv(x)


class WritesToItsInput(Plain):
    def forward(self, x, noise=None):
        out = self.conv(x)
        x.data.mul_(0.5)
        return out


class OneScore(Plain):
    def score(self, x):
        return x.sum()


class Renames(Plain):
    def views(self):
        self.calls += 1
        return {f"view-{self.calls}": self.forward}


@pytest.mark.parametrize("defence", [Quantise(2), Quantise(8), Quantise(256), Plain(), Noisy()], ids=repr)
def test_valid_defences_pass_and_are_unchanged(defence, cases):
    defence.train()
    before = module_state(defence)
    count = check_defence(defence, examples=8)
    assert count >= 7 * 8
    assert module_state(defence) == before
    cases(count)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (SecretlyNoisy, "only_stochastic"),
        (IgnoresNoise, "rows_are_independent|only_stochastic"),
        (Mixes, "rows_are_independent"),
        (Shrinks, "rows_are_independent"),
        (Overflows, "rows_are_independent"),
        (Detached, "views_have_finite"),
        (Blind, "views_have_finite"),
        (NotExact, "exact_views"),
        (OtherShape, "views_have_finite"),
        (Steep, "views_have_finite"),
        (Counts, "state_is_unchanged"),
        (WritesToItsInput, "state_is_unchanged|only_stochastic"),
        (OneScore, "score_is_one"),
        (Renames, "guarded_target"),
    ],
)
def test_each_broken_defence_violates_its_law(broken, law):
    with pytest.raises(AssertionError) as caught:
        check_defence(broken(), examples=8)
    note = " ".join(getattr(caught.value, "__notes__", []))
    assert any(name in note for name in law.split("|")), note


def test_any_input_shape_works(cases):
    cases(check_defence(Quantise(4), shape=(5,), examples=4))


def test_other_objects_than_defences_are_refused():
    with pytest.raises(ArgumentError, match="must be a Defence"):
        check_defence(nn.Identity())


def test_missing_hypothesis_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises((MissingExtraError, ImportError)):
        check_defence(Quantise(2))
