"""The laws of defences hold for ours, and each of these broken ones is caught by the law that it breaks."""

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
from robustkit.testing.nets import world_of


@pytest.fixture(autouse=True)
def without_shrinking():
    """The laws fail here on purpose: nobody needs the smallest case."""
    settings.register_profile("unshrunk", settings(), phases=[Phase.generate])
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


class Plain(Defence):
    """A learned blur; sound. Its children break one thing each."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(1, 1, 3, padding=1), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, noise=None):
        return self.conv(x)

    def views(self):
        return {"exact": self.forward}


class Noisy(Plain):
    """Sound as well: it says that it is random, and its noise can be given."""

    stochastic = True

    def forward(self, x, noise=None):
        return self.conv(x) + (torch.rand(x.shape) if noise is None else noise.uniform(*x.shape[1:]))


class SecretlyNoisy(Noisy):
    stochastic = False


class DeafToNoise(Noisy):
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
def test_sound_defences_pass_and_are_left_as_found(defence, cases):
    defence.train()
    before = world_of(defence)
    count = check_defence(defence, examples=8)
    assert count >= 7 * 8
    assert world_of(defence) == before
    cases(count)


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (SecretlyNoisy, "is_honest"),
        (DeafToNoise, "takes_rows|is_honest"),
        (Mixes, "takes_rows"),
        (Shrinks, "takes_rows"),
        (Overflows, "takes_rows"),
        (Detached, "views_show"),
        (Blind, "views_show"),
        (NotExact, "exact_means"),
        (OtherShape, "views_show"),
        (Steep, "views_show"),
        (Counts, "leaves_the_world"),
        (WritesToItsInput, "leaves_the_world|is_honest"),
        (OneScore, "scores"),
        (Renames, "guards"),
    ],
)
def test_each_broken_defence_is_caught(broken, law):
    with pytest.raises(AssertionError) as caught:
        check_defence(broken(), examples=8)
    note = " ".join(getattr(caught.value, "__notes__", []))
    assert any(name in note for name in law.split("|")), note


def test_any_shape_will_do(cases):
    cases(check_defence(Quantise(4), shape=(5,), examples=4))


def test_what_is_no_defence_is_refused():
    with pytest.raises(ArgumentError, match="must be a Defence"):
        check_defence(nn.Identity())


def test_a_missing_hypothesis_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises((MissingExtraError, ImportError)):
        check_defence(Quantise(2))
