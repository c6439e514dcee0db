"""Randomised targets: one lucky draw is no success."""

import torch
from torch import nn

from robustkit import FGSM, PGD, Linf, Target
from robustkit.verdict import FRESH_DRAWS

N = 60
X = 0.7 * torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(N, dtype=torch.int64)


class Wrong(nn.Module):
    """Wrong with a probability that depends on whether the first value was raised."""

    def __init__(self, before, after, generator=None):
        super().__init__()
        self.before, self.after, self.generator = before, after, generator
        self.eval()

    def forward(self, x):
        chance = torch.where(x[:, 0, 0, 0] > X[: len(x), 0, 0, 0] + 0.05, self.after, self.before)
        wrong = (torch.rand(len(x), generator=self.generator) < chance).float()
        return torch.stack([1 - 2 * wrong, 2 * wrong - 1], 1) + 0.01 * x[:, 0, 0] * torch.tensor([-1.0, 1.0])


def test_lucky_draws_are_not_claimed():
    """Every step of PGD-40 sees a wrong answer with probability 0.3; naively 1 - 0.7^40, all, would count as broken."""
    result = PGD()(Wrong(0.3, 0.3), X, Y, threat=Linf(0.1))
    assert result.success.double().mean() < 0.05
    # The rate is measured on draws that nobody searched: its mean is the truth, 0.3, within four standard errors.
    assert (result.rate.mean() - 0.3).abs() < 4 * (0.3 * 0.7 / N / FRESH_DRAWS) ** 0.5
    assert [note.name for note in result.notes] == ["stochastic-target"]


def test_a_change_that_really_helps_is_claimed():
    result = PGD(steps=10)(Wrong(0.1, 0.9), X, Y, threat=Linf(0.2), keep="best")
    assert result.success.double().mean() > 0.95


def test_a_target_that_is_mostly_wrong_anyway_is_a_success_of_size_zero():
    result = FGSM()(Wrong(0.9, 0.1), X, Y, threat=Linf(0.1))
    assert result.success.all()
    assert (result.size == 0).double().mean() > 0.9


def test_randomness_that_nobody_declared_is_noticed_and_scored_on_fresh_draws():
    """A generator of the model's own leaves no trace in the global one; the successes that do not repeat give it away."""
    own = torch.Generator().manual_seed(0)
    result = PGD()(Wrong(0.3, 0.3, own), X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == ["unsteady-target"]
    assert result.success.double().mean() < 0.05
    declared = PGD()(Target(Wrong(0.3, 0.3, own), stochastic=True), X, Y, threat=Linf(0.1))
    assert declared.flags == ()
    assert declared.success.double().mean() < 0.05


def test_numbers_of_a_random_target_repeat_with_the_seed():
    one, other = (PGD(steps=3)(Wrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=5) for _ in range(2))
    assert torch.equal(one.rate, other.rate)
    assert not torch.equal(one.rate, PGD(steps=3)(Wrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=6).rate)
