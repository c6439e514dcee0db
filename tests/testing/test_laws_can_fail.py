"""The laws catch what they are there for: each of these attacks, threats and goals breaks one of them."""

import contextlib
import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, settings

from robustkit import FGSM, L1, L2, PGD, Attack, ClassifyAs, Goal, Linf, Misclassify
from robustkit.goals import Goal as GoalBase
from robustkit.testing import attack_laws, check_attack, check_goal, goal_laws, threat_laws
from robustkit.testing._runs import holds
from robustkit.threats import Threat


@pytest.fixture(autouse=True)
def without_shrinking():
    """The laws fail here on purpose: nobody needs the smallest case."""
    before = settings().max_examples
    settings.register_profile("unshrunk", settings(), phases=[Phase.generate])
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
    assert settings().max_examples == before


class GlobalNoise(Attack):
    def run(self, problem):
        return problem.threat.project(problem.x + 0.3 * torch.randn_like(problem.x), problem.x)


class Swallows(Attack):
    def run(self, problem):
        with contextlib.suppress(Exception):
            problem.loss_and_grad(problem.x)
        return problem.x


class LeaksGradients(Attack):
    def run(self, problem):
        module = problem._target.module
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return problem.x


class AsksInSecret(Attack):
    def run(self, problem):
        problem._target.fn(problem.x)
        return problem.x


class BatchNoise(Attack):
    def run(self, problem):
        return problem.threat.project(problem.x + 0.3 * torch.randn(problem.x.shape, generator=torch.Generator()), problem.x)


class MixesTheBatch(Attack):
    """Follows the average gradient of whoever happens to be in the batch."""

    def run(self, problem):
        _, grad = problem.loss_and_grad(problem.x)
        return problem.threat.steepest(-(grad + grad.mean(0)), problem.x)


class OneBudgetForAll(Attack):
    def run(self, problem):
        return (problem.x + float(problem.threat.eps)).clamp(0, 1)


class Weak(Attack):
    def run(self, problem):
        return problem.x


@pytest.mark.parametrize(
    ("attack", "law"),
    [
        (LeaksGradients(), "leaves_the_world_alone"),
        (Swallows(), "leaves_the_world_alone_when_the_model_raises"),
        (AsksInSecret(), "costs_are_what_the_model_saw"),
        (BatchNoise(), "noise_belongs_to_the_example"),
        (GlobalNoise(), "noise_belongs_to_the_example"),
        (MixesTheBatch(), "noise_belongs_to_the_example"),
        (OneBudgetForAll(), "stays_in_the_threat"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_attack_breaks_its_law(attack, law):
    with pytest.raises((AssertionError, ValueError)) as failure:
        holds(getattr(attack_laws, law), attack, attack_laws._cases([Linf, L2]), 100)
    assert any(law in note for note in failure.value.__notes__)


def test_a_weak_attack_is_not_exact():
    with pytest.raises(AssertionError):
        holds(attack_laws.solves_a_hyperplane_exactly, Weak(), attack_laws._unbounded(Linf), 100)
    with pytest.raises(AssertionError):
        holds(attack_laws.comes_close_to_the_optimum, (Weak(), 1.25), attack_laws._unbounded(Linf), 100)
    with pytest.raises(AssertionError):  # 12 steps turn a random start in L2 not far enough
        check_attack(PGD(steps=2, reach=0.5), serves=(Linf,), exact=(L2,), examples=50)


CHEATS = {
    "never_beats_the_optimum": lambda result: replace(result, success=torch.ones_like(result.success)),
    "success_is_a_recount": lambda result: replace(result, success=~result.success),
    "stays_in_the_threat": lambda result: replace(result, x_adv=result.x_adv + 0.01),
    "claims_nothing_against_a_coin": lambda result: replace(result, success=torch.ones_like(result.success)),
    "same_seed_same_bytes": lambda result: replace(result, x_adv=result.x_adv + 1e-6 * torch.rand(())),
}


@pytest.mark.parametrize("law", CHEATS)
def test_a_cheating_result_breaks_its_law(law):
    class Cheats:
        def __call__(self, target, x, y, **call):
            return CHEATS[law](FGSM()(target, x, y, **call))

    with pytest.raises(AssertionError):
        holds(getattr(attack_laws, law), Cheats(), attack_laws._cases([Linf, L2]), 100)


def altered(kind, **methods):
    """A threat with some methods replaced: what a mistake in them would look like."""
    return type(kind.__name__, (kind,), methods)


THREATS = {
    "project_lands_inside": altered(Linf, project=lambda self, x_adv, x: x_adv),
    "project_is_idempotent": altered(L2, project=lambda self, x_adv, x: x + (x_adv - x) * 0.5),
    "project_leaves_points_inside_alone": altered(Linf, project=lambda self, x_adv, x: x + (x_adv - x) * 0.5),
    "project_is_not_expansive": altered(Linf, project=lambda self, x_adv, x: x + self.eps * (x_adv - x).sign()),
    "samples_lie_inside": altered(Linf, sample=lambda self, x, noise: x + 2),
    "steepest_reaches_the_best_gain": altered(L2, steepest=lambda self, grad, x: self.project(x + 9 * grad.sign(), x)),
    "step_gains": altered(L1, move=lambda self, grad, x_adv, x, length: x_adv - length * grad.sign()),
    "one_budget_an_example": altered(Linf, project=lambda self, x_adv, x: x + (x_adv - x).clamp(-0.01, 0.01)),
    "size_is_zero_only_without_a_change": altered(Linf, size=lambda self, x_adv, x: torch.zeros(len(x)).double()),
}


@pytest.mark.parametrize("law", [law.__name__ for law in threat_laws.LAWS])
def test_a_broken_threat_breaks_its_law(law, monkeypatch):
    kind = THREATS[law]
    monkeypatch.setattr("robustkit.testing.strategies.threats", _with(kind))
    with pytest.raises(AssertionError):
        holds(getattr(threat_laws, law), kind, threat_laws._cases(kind), 200)


def _with(kind):
    from robustkit.testing import strategies

    original, base = strategies.threats, kind.__mro__[1]
    return lambda kinds, *, bounded=True, budgets=None: original([base], bounded=bounded).map(lambda t: kind(t.eps, t.bounds))


@dataclass(frozen=True)
class Dependent(Goal):
    """The loss of a row depends on the others."""

    def loss(self, out, ref):
        return out.sum(1) / out.std()

    def success(self, out, ref):
        return out[:, 0] > out[0, 0]


@dataclass(frozen=True)
class HalfParts(Goal):
    def loss(self, out, ref):
        return Misclassify().loss(out, ref)

    def success(self, out, ref):
        return Misclassify().success(out, ref)

    def parts(self, out, ref):
        return [(ClassifyAs(), (ref + 1) % out.shape[1])]


@dataclass(frozen=True)
class Flat(Goal):
    def loss(self, out, ref):
        return out.detach().sum(1) + 0 * out.sum(1).log()

    def success(self, out, ref):
        return out[:, 0] > 0


@pytest.mark.parametrize("goal", [Dependent(), HalfParts(), Flat()], ids=lambda goal: type(goal).__name__)
def test_a_broken_goal_breaks_its_law(goal):
    from cases import classified

    with pytest.raises((AssertionError, RuntimeError)):
        check_goal(goal, classified(4), examples=100)


def test_the_names_are_exported():
    assert issubclass(Goal, GoalBase)
    assert issubclass(Linf, Threat)
    assert goal_laws.check_goal is check_goal


def test_threats_of_ones_own_are_checked_with_budgets_of_ones_own():
    from hypothesis import strategies as st

    from robustkit.errors import ArgumentError
    from robustkit.testing import check_threat

    mine = altered(Linf)
    with pytest.raises(ArgumentError, match="budgets=None"):
        check_threat(mine, examples=1)
    assert check_threat(mine, budgets=st.floats(0.01, 0.9), examples=5) == 5 * len(threat_laws.LAWS)
