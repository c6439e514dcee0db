"""Randomised targets: one lucky draw is no success."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustkit import FGSM, PGD, Attack, ClassifyAs, Linf, Misclassify, Target
from robustkit._engine.verdict import FRESH_DRAWS

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
        generator = self.generator() if callable(self.generator) else self.generator
        wrong = (torch.rand(len(x), generator=generator) < chance).float()
        return torch.stack([1 - 2 * wrong, 2 * wrong - 1], 1) + 0.01 * x[:, 0, 0] * torch.tensor([-1.0, 1.0])


class Hidden:
    """Something that hands out a generator and shows it to nobody."""

    __slots__ = ("__generator",)

    def __init__(self, generator):
        self.__generator = generator

    def __call__(self):
        return self.__generator


@pytest.mark.parametrize("keep", ["first", "best", "smallest", "last"])
@pytest.mark.parametrize("batch_size", [1, 128])
def test_a_generator_of_the_models_own_is_watched(keep, batch_size):
    """It leaves no trace in the global ones; one example at a time, nothing but its state gives it away."""
    target = Target(Wrong(0.25, 0.25, torch.Generator().manual_seed(0)), batch_size=batch_size)
    result = FGSM()(target, X[:20], Y[:20], threat=Linf(0.1), keep=keep)
    assert "stochastic-target" in {note.name for note in result.notes}
    assert result.success.double().mean() < 0.11


@dataclass(frozen=True)
class Blind(Attack):
    """Asks nothing, as a perturbation made elsewhere would, and meddles with the generators."""

    def run(self, problem):
        torch.manual_seed(3)
        return problem.threat.project(problem.x + 0.1, problem.x)


@pytest.mark.parametrize("keep", ["first", "best", "smallest", "last"])
@pytest.mark.parametrize("goal", [Misclassify(), ClassifyAs()])
def test_an_attack_that_never_asks_is_judged_on_fresh_draws(keep, goal):
    ref = Y if goal == Misclassify() else 1 - Y
    result = Blind()(Wrong(0.25, 0.25), X, ref, goal=goal, threat=Linf(0.1), keep=keep)
    assert result.success.double().mean() < 0.05
    assert "stochastic-target" in {note.name for note in result.notes}


def test_a_success_that_was_seen_is_not_given_up_for_a_lower_loss():
    """A deterministic model that draws a number for no reason counts as stochastic; it loses nothing by that."""
    x, y, visited = torch.full((4, 3), 0.5), torch.zeros(4, dtype=torch.int64), (0.1, 0.2)
    # The first visited point is a success, the second has the lower loss and is none.
    logits = {0.0: [3.0, 0.0, 0.0], 0.1: [2.0, 2.1, -9.0], 0.2: [0.1, 0.0, 0.0]}

    def table(x):
        seen = [min(logits, key=lambda d: abs(d - float(v) + 0.5)) for v in x.detach()[:, 0]]
        return torch.tensor([logits[s] for s in seen]) + 0 * x.sum(1, keepdim=True)

    def logs(x):
        torch.rand(1)
        return table(x)

    @dataclass(frozen=True)
    class Walk(Attack):
        def run(self, problem):
            for delta in visited:
                problem.loss_and_grad(problem.x + delta)
            return problem.x

    assert Walk()(logs, x, y, threat=Linf(0.3)).success.all()
    assert "stochastic-target" not in {note.name for note in Walk()(Target(table, draws=2), x, y, threat=Linf(0.3)).notes}


def test_lucky_draws_are_not_claimed():
    """Every step of PGD-40 sees a wrong answer with probability 0.3; naively 1 - 0.7^40, all, would count as broken."""
    result = PGD()(Wrong(0.3, 0.3), X, Y, threat=Linf(0.1))
    assert result.success.double().mean() < 0.05
    # The rate is measured on draws that nobody searched: its mean is the truth, 0.3, within four standard errors.
    assert (result.rate.mean() - 0.3).abs() < 4 * (0.3 * 0.7 / N / FRESH_DRAWS) ** 0.5
    assert [note.name for note in result.notes] == ["stochastic-target"]


@pytest.mark.parametrize("declared", [None, True])
def test_randomness_that_nobody_declared_is_an_alarm(declared):
    """Dropout that was left on looks like a defence; who means it says so."""
    target = Target(Wrong(0.3, 0.3), stochastic=declared)
    result = PGD(steps=5)(target, X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == (["undeclared-randomness"] if declared is None else [])
    assert [note.name for note in result.notes] == ["stochastic-target"]


def test_a_change_that_really_helps_is_claimed():
    result = PGD(steps=10)(Wrong(0.1, 0.9), X, Y, threat=Linf(0.2), keep="best")
    assert result.success.double().mean() > 0.95


def test_a_target_that_is_mostly_wrong_anyway_is_a_success_of_size_zero():
    result = FGSM()(Wrong(0.9, 0.1), X, Y, threat=Linf(0.1))
    assert result.success.all()
    assert (result.size == 0).double().mean() > 0.9


def test_randomness_that_nobody_declared_is_noticed_and_scored_on_fresh_draws():
    """Where the generator is hidden well, the successes that do not repeat give it away."""
    own = torch.Generator().manual_seed(0)
    result = PGD()(Wrong(0.3, 0.3, Hidden(own)), X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == ["unsteady-target"]
    assert result.success.double().mean() < 0.05
    declared = PGD()(Target(Wrong(0.3, 0.3, own), stochastic=True), X, Y, threat=Linf(0.1))
    assert declared.flags == ()
    assert declared.success.double().mean() < 0.05


def test_numbers_of_a_random_target_repeat_with_the_seed():
    one, other = (PGD(steps=3)(Wrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=5) for _ in range(2))
    assert torch.equal(one.rate, other.rate)
    assert not torch.equal(one.rate, PGD(steps=3)(Wrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=6).rate)
