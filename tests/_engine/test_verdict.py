"""Stochastic targets: a single successful draw is not a success."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustkit import FGSM, PGD, Attack, ClassifyAs, Linf, Misclassify, Target
from robustkit._engine.verdict import FRESH_DRAWS

N = 60
X = 0.7 * torch.rand(N, 1, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(N, dtype=torch.int64)


class RandomlyWrong(nn.Module):
    """Wrong with a probability that depends on whether the first value was increased."""

    def __init__(self, before, after, generator=None):
        super().__init__()
        self.before, self.after, self.generator = before, after, generator
        self.eval()

    def forward(self, x):
        probability = torch.where(x[:, 0, 0, 0] > X[: len(x), 0, 0, 0] + 0.05, self.after, self.before)
        generator = self.generator() if callable(self.generator) else self.generator
        wrong = (torch.rand(len(x), generator=generator) < probability).float()
        return torch.stack([1 - 2 * wrong, 2 * wrong - 1], 1) + 0.01 * x[:, 0, 0] * torch.tensor([-1.0, 1.0])


class Hidden:
    """Returns a generator that introspection cannot find."""

    __slots__ = ("__generator",)

    def __init__(self, generator):
        self.__generator = generator

    def __call__(self):
        return self.__generator


@pytest.mark.parametrize("keep", ["first", "best", "smallest", "last"])
@pytest.mark.parametrize("batch_size", [1, 128])
def test_a_generator_of_the_model_is_detected(keep, batch_size):
    """It does not change the global generators, and with one example per batch only its own state reveals it."""
    target = Target(RandomlyWrong(0.25, 0.25, torch.Generator().manual_seed(0)), batch_size=batch_size)
    result = FGSM()(target, X[:20], Y[:20], threat=Linf(0.1), keep=keep)
    assert "stochastic-target" in {note.name for note in result.notes}
    assert result.success.double().mean() < 0.11


@dataclass(frozen=True)
class NoQueries(Attack):
    """Makes no query, like a precomputed perturbation, and seeds the global generator."""

    def run(self, problem):
        torch.manual_seed(3)
        return problem.threat.project(problem.x + 0.1, problem.x)


@pytest.mark.parametrize("keep", ["first", "best", "smallest", "last"])
@pytest.mark.parametrize("goal", [Misclassify(), ClassifyAs()])
def test_an_attack_without_queries_is_evaluated_on_fresh_draws(keep, goal):
    ref = Y if goal == Misclassify() else 1 - Y
    result = NoQueries()(RandomlyWrong(0.25, 0.25), X, ref, goal=goal, threat=Linf(0.1), keep=keep)
    assert result.success.double().mean() < 0.05
    assert "stochastic-target" in {note.name for note in result.notes}


def test_a_success_is_preferred_to_a_failure_with_a_lower_loss():
    """A deterministic model that draws an unused random number counts as stochastic, with the same result."""
    x, y, deltas = torch.full((4, 3), 0.5), torch.zeros(4, dtype=torch.int64), (0.1, 0.2)
    # The first point is a success; the second has a lower loss and is not.
    logits = {0.0: [3.0, 0.0, 0.0], 0.1: [2.0, 2.1, -9.0], 0.2: [0.1, 0.0, 0.0]}

    def table(x):
        keys = [min(logits, key=lambda d: abs(d - float(v) + 0.5)) for v in x.detach()[:, 0]]
        return torch.tensor([logits[key] for key in keys]) + 0 * x.sum(1, keepdim=True)

    def draws_unused_number(x):
        torch.rand(1)
        return table(x)

    @dataclass(frozen=True)
    class FixedPath(Attack):
        def run(self, problem):
            for delta in deltas:
                problem.loss_and_grad(problem.x + delta)
            return problem.x

    assert FixedPath()(draws_unused_number, x, y, threat=Linf(0.3)).success.all()
    assert "stochastic-target" not in {note.name for note in FixedPath()(Target(table, draws=2), x, y, threat=Linf(0.3)).notes}


def test_lucky_draws_are_not_successes():
    """Each step of PGD-40 sees a wrong output with probability 0.3; naively 1 - 0.7^40, nearly all, would count as broken."""
    result = PGD()(RandomlyWrong(0.3, 0.3), X, Y, threat=Linf(0.1))
    assert result.success.double().mean() < 0.05
    # The rate is estimated on fresh draws: its mean is the true 0.3 within four standard errors.
    assert (result.rate.mean() - 0.3).abs() < 4 * (0.3 * 0.7 / N / FRESH_DRAWS) ** 0.5
    assert [note.name for note in result.notes] == ["stochastic-target"]


@pytest.mark.parametrize("declared", [None, True])
def test_undeclared_randomness_raises_a_flag(declared):
    """Dropout left on by mistake looks like a defence; intended randomness is declared."""
    target = Target(RandomlyWrong(0.3, 0.3), stochastic=declared)
    result = PGD(steps=5)(target, X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == (["undeclared-randomness"] if declared is None else [])
    assert [note.name for note in result.notes] == ["stochastic-target"]


def test_a_perturbation_that_works_on_most_draws_is_a_success():
    result = PGD(steps=10)(RandomlyWrong(0.1, 0.9), X, Y, threat=Linf(0.2), keep="best")
    assert result.success.double().mean() > 0.95


def test_a_clean_input_that_is_mostly_wrong_is_a_success_of_size_zero():
    result = FGSM()(RandomlyWrong(0.9, 0.1), X, Y, threat=Linf(0.1))
    assert result.success.all()
    assert (result.size == 0).double().mean() > 0.9


def test_hidden_randomness_is_detected_and_scored_on_fresh_draws():
    """If the generator cannot be found, successes that do not repeat reveal it."""
    generator = torch.Generator().manual_seed(0)
    result = PGD()(RandomlyWrong(0.3, 0.3, Hidden(generator)), X, Y, threat=Linf(0.1))
    assert [flag.name for flag in result.flags] == ["unsteady-target"]
    assert result.success.double().mean() < 0.05
    declared = PGD()(Target(RandomlyWrong(0.3, 0.3, generator), stochastic=True), X, Y, threat=Linf(0.1))
    assert declared.flags == ()
    assert declared.success.double().mean() < 0.05


def test_results_of_a_stochastic_target_repeat_with_the_seed():
    first, second = (PGD(steps=3)(RandomlyWrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=5) for _ in range(2))
    assert torch.equal(first.rate, second.rate)
    assert not torch.equal(first.rate, PGD(steps=3)(RandomlyWrong(0.4, 0.4), X, Y, threat=Linf(0.1), seed=6).rate)
