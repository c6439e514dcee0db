"""Each law can fail: every attack, threat and goal in this file violates one."""

import contextlib
import os
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, settings

from robustkit import FGSM, L1, L2, PGD, Attack, ClassifyAs, Goal, Linf, Misclassify
from robustkit.goals import Goal as GoalBase
from robustkit.testing import attack_laws, check_attack, check_goal, goal_laws, threat_laws
from robustkit.testing._check_law import check_law
from robustkit.threats import Threat


@pytest.fixture(autouse=True)
def without_shrinking():
    """Laws fail here on purpose; skip the search for the smallest case."""
    before = settings().max_examples
    settings.register_profile("unshrunk", settings(), phases=[Phase.generate])
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(os.environ["HYPOTHESIS_PROFILE"])
    assert settings().max_examples == before


class GlobalNoise(Attack):
    def run(self, problem):
        return problem.threat.project(problem.x + 0.3 * torch.randn_like(problem.x), problem.x)


class SwallowsErrors(Attack):
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


class QueriesUncounted(Attack):
    def run(self, problem):
        problem._target.fn(problem.x)
        return problem.x


class BatchNoise(Attack):
    def run(self, problem):
        return problem.threat.project(problem.x + 0.3 * torch.randn(problem.x.shape, generator=torch.Generator()), problem.x)


class MixesTheBatch(Attack):
    """Uses the mean gradient of the batch."""

    def run(self, problem):
        _, grad = problem.loss_and_grad(problem.x)
        return problem.threat.steepest(-(grad + grad.mean(0)), problem.x)


class OneEpsForAll(Attack):
    def run(self, problem):
        return (problem.x + float(problem.threat.eps)).clamp(0, 1)


class Weak(Attack):
    def run(self, problem):
        return problem.x


@pytest.mark.parametrize(
    ("attack", "law"),
    [
        (LeaksGradients(), "state_is_unchanged"),
        (SwallowsErrors(), "state_is_unchanged_when_the_model_raises"),
        (QueriesUncounted(), "costs_match_the_model_calls"),
        (BatchNoise(), "result_does_not_depend_on_the_batch"),
        (GlobalNoise(), "result_does_not_depend_on_the_batch"),
        (MixesTheBatch(), "result_does_not_depend_on_the_batch"),
        (OneEpsForAll(), "result_is_inside_the_threat"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_broken_attack_violates_its_law(attack, law):
    with pytest.raises((AssertionError, ValueError)) as failure:
        check_law(getattr(attack_laws, law), attack, attack_laws._cases([Linf, L2]), 100)
    assert any(law in note for note in failure.value.__notes__)


@pytest.mark.slow
def test_a_weak_attack_is_not_exact():
    with pytest.raises(AssertionError):
        check_law(attack_laws.solves_a_hyperplane_whenever_possible, Weak(), attack_laws._unbounded(Linf), 100)
    with pytest.raises(AssertionError):
        check_law(attack_laws.perturbation_is_near_the_optimum, (Weak(), 1.25), attack_laws._unbounded(Linf), 100)
    with pytest.raises(AssertionError):  # from a random start in L2 these steps do not reach the steepest direction
        check_law(attack_laws.solves_a_hyperplane_whenever_possible, PGD(steps=2, reach=0.5), attack_laws._unbounded(L2), 50)
    with pytest.raises(AssertionError):
        check_attack(Weak(), serves=(Linf,), exact=(Linf,), examples=10)
    with pytest.raises(AssertionError):
        check_attack(Weak(), serves=(Linf,), within=1.25, examples=10)


WRONG_RESULTS = {
    "never_beats_the_optimum": lambda result: replace(result, success=torch.ones_like(result.success)),
    "success_matches_the_model": lambda result: replace(result, success=~result.success),
    "result_is_inside_the_threat": lambda result: replace(result, x_adv=result.x_adv + 0.01),
    "no_success_against_random_predictions": lambda result: replace(result, success=torch.ones_like(result.success)),
    "same_seed_gives_identical_results": lambda result: replace(result, x_adv=result.x_adv + 1e-6 * torch.rand(())),
}


@pytest.mark.parametrize("law", WRONG_RESULTS)
def test_a_wrong_result_violates_its_law(law):
    class WrongResult:
        def __call__(self, target, x, y, **call):
            return WRONG_RESULTS[law](FGSM()(target, x, y, **call))

    with pytest.raises(AssertionError):
        check_law(getattr(attack_laws, law), WrongResult(), attack_laws._cases([Linf, L2]), 100)


def altered(kind, **methods):
    """Return a threat class with some methods replaced by wrong ones."""
    return type(kind.__name__, (kind,), methods)


THREATS = {
    "projection_is_inside_the_threat": altered(Linf, project=lambda self, x_adv, x: x_adv),
    "projection_is_idempotent": altered(L2, project=lambda self, x_adv, x: x + (x_adv - x) * 0.5),
    "projection_does_not_move_inside_points": altered(Linf, project=lambda self, x_adv, x: x + (x_adv - x) * 0.5),
    "projection_is_non_expansive": altered(Linf, project=lambda self, x_adv, x: x + self.eps * (x_adv - x).sign()),
    "samples_are_inside_and_per_example": altered(Linf, sample=lambda self, x, noise: x + 2),
    "steepest_maximises_a_linear_function": altered(L2, steepest=lambda self, grad, x: self.project(x + 9 * grad.sign(), x)),
    "step_does_not_decrease_a_linear_function": altered(
        L1, move=lambda self, grad, x_adv, x, length: x_adv - length * grad.sign()
    ),
    "eps_may_differ_per_example": altered(Linf, project=lambda self, x_adv, x: x + (x_adv - x).clamp(-0.01, 0.01)),
    "size_is_zero_only_at_x": altered(Linf, size=lambda self, x_adv, x: torch.zeros(len(x)).double()),
}


@pytest.mark.parametrize("law", [law.__name__ for law in threat_laws.LAWS])
def test_a_broken_threat_violates_its_law(law, monkeypatch):
    kind = THREATS[law]
    monkeypatch.setattr("robustkit.testing.strategies.threats", _with(kind))
    with pytest.raises(AssertionError):
        check_law(getattr(threat_laws, law), kind, threat_laws._cases(kind), 200)


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
def test_a_broken_goal_violates_its_law(goal):
    from cases import classified

    with pytest.raises((AssertionError, RuntimeError)):
        check_goal(goal, classified(4), examples=100)


def test_the_names_are_exported():
    assert issubclass(Goal, GoalBase)
    assert issubclass(Linf, Threat)
    assert goal_laws.check_goal is check_goal


def test_own_threats_are_checked_with_own_budgets():
    from hypothesis import strategies as st

    from robustkit.errors import ArgumentError
    from robustkit.testing import check_threat

    mine = altered(Linf)
    with pytest.raises(ArgumentError, match="budgets=None"):
        check_threat(mine, examples=1)
    assert check_threat(mine, budgets=st.floats(0.01, 0.9), examples=5) == 5 * len(threat_laws.LAWS)
