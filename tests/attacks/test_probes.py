import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustkit import L1, L2, Attack, Linf, Misclassify, Pixels, Target
from robustkit.attacks import Standard, _escalation
from robustkit.attacks import _probes as probes
from robustkit.attacks.audit import Audit
from robustkit.errors import ArgumentError

N, EPS = 24, 0.1


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


SOUND = net()
X = 0.2 + 0.6 * torch.rand(N, 1, 4, 4, generator=torch.Generator().manual_seed(1))
Y = SOUND(X).argmax(1)


@dataclass(frozen=True)
class Ask(Attack):
    """The inside of an attack, seen from a test."""

    question: object

    def run(self, problem):
        self.question(problem)
        return problem.x


def ask(question, model=SOUND, threat=Linf(EPS), x=X, y=Y, **options):
    return Ask(question)(model, x, y, threat=threat, **options)


def seen(result):
    return {one.name: (one.hits, one.of) for one in result.evidence}


def names(remarks):
    return {remark.name for remark in remarks}


def raised(result):
    return names(result.flags) - {"flat-gradients", "train-mode", "unsteady-target"}  # those are no probe's


def everyone(problem):
    return torch.arange(len(problem))


def agreement(problem):
    probes.agreement(problem, everyone(problem))


def small_steps(problem):
    probes.small_steps(problem, everyone(problem))


def raw_runs(problem):
    probes.raw_runs(problem, everyone(problem))


def unbounded(problem):
    probes.unbounded(problem, everyone(problem))


def survivors(problem):
    probes.survivors(problem, 1.0)


# The models that the probes are for.


class Masked(nn.Module):
    """A net behind one function and in front of another."""

    def __init__(self, before=lambda x: x, after=lambda out: out):
        super().__init__()
        self.net, self.before, self.after = copy.deepcopy(SOUND), before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


class Flip(torch.autograd.Function):
    """The identity, with a derivative of minus one."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Broken(torch.autograd.Function):
    """The identity, without a way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no way back")


class Counter(nn.Module):
    """A net whose answer is a function of how often it was asked."""

    def __init__(self, fn):
        super().__init__()
        self.net, self.fn, self.calls = copy.deepcopy(SOUND), fn, 0

    def forward(self, x):
        self.calls += 1
        return self.fn(self.net(x), self.calls)


DETACHED = Masked(before=torch.detach)
FLIPPED = Masked(before=Flip.apply)
BROKEN = Masked(before=Broken.apply)


def some_undefined(out):
    return torch.where(out[:, :1] > out[:, :1].median(), torch.nan, out)


def of_its_batch(x):
    return x - x.mean(0)


def alternating(out, calls):
    return out + torch.tensor([0.5, 0.0, -0.5]) * (-1) ** calls


@pytest.mark.parametrize(
    ("flag", "probe", "model"),
    [
        ("gradients-disagree", agreement, DETACHED),
        ("gradients-disagree", agreement, FLIPPED),
        ("small-steps-disagree", small_steps, DETACHED),
        ("small-steps-disagree", small_steps, FLIPPED),
        ("saturated-outputs", probes.answers, Masked(after=lambda out: 1e5 * out)),
        ("saturated-outputs", probes.answers, Masked(after=lambda out: functional.one_hot(out.argmax(1), 3).float())),
        ("undefined-outputs", probes.answers, Masked(after=some_undefined)),
        ("unsteady-answers", probes.company, Counter(alternating)),
        ("batch-dependent", probes.company, Masked(before=of_its_batch)),
        ("unbounded-leaves-robust", unbounded, DETACHED),
        ("unbounded-leaves-robust", unbounded, FLIPPED),
        ("gradient-free-breaks", survivors, DETACHED),
    ],
)
def test_each_probe_flags_the_model_that_it_is_for_and_not_a_sound_one(flag, probe, model):
    y = model(X).nan_to_num(-1e9).argmax(1) if probe is not probes.company else Y
    # Gradients withstood in half a budget leave nothing for the search without gradients to find.
    small = Linf(1e-4) if probe is survivors else Linf(EPS)
    big = Linf(0.4) if probe is survivors else Linf(EPS)
    assert raised(ask(probe, model, y=y, threat=big)) == {flag}
    result = ask(probe, SOUND, threat=small)
    assert raised(result) == set()
    assert flag in seen(result)


def test_an_infinite_minus_for_a_class_that_is_closed_is_defined():
    closed = Masked(after=lambda out: torch.cat([out, torch.full((len(out), 1), -torch.inf)], 1))
    assert raised(ask(probes.answers, closed)) == set()


def test_probabilities_are_noted():
    assert names(ask(probes.answers, Masked(after=lambda out: out.softmax(1))).notes) == {"probabilities"}
    assert names(ask(probes.answers).notes) == set()
    # Ones and zeros are a worse thing, and told as that.
    hard = ask(probes.answers, Masked(after=lambda out: (1e6 * out).softmax(1)))
    assert names(hard.notes) == set()
    assert raised(hard) == {"saturated-outputs"}


@pytest.mark.parametrize(
    ("bounds", "told"), [((0.0, 1.0), False), ((0.0, 255.0), False), ((-1.0, 1.0), False), ((-2.1, 2.6), True), (None, False)]
)
def test_an_unusual_range_is_noted(bounds, told):
    result = ask(lambda p: probes.ordinary(p.threat, p), threat=Linf(0.1, bounds=bounds))
    assert ("unusual-range" in names(result.notes)) is told
    assert raised(result) == set()


# How the gradient is compared.


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0), Pixels(2), Linf(0.1, bounds=None), L2(0.5, bounds=None)])
def test_of_a_linear_model_every_gradient_agrees_and_of_a_flipped_one_none(threat):
    """Central differences of a linear function are its derivative, whatever the step; x is left in the middle of a class."""
    weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def linear(x):
        return x.flatten(1) @ weight

    def flipped(x):
        return Flip.apply(x.flatten(1)) @ weight

    y = linear(X).argmax(1)
    for model, hits in ((linear, 0), (flipped, N)):
        assert seen(ask(agreement, model, threat=threat, y=y)) == {"gradients-disagree": (hits, N)}


def test_float64_is_asked_only_where_the_model_can_be_copied_to_it():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(SOUND)

        def forward(self, x):
            return self.net(x.float())

    assert seen(ask(small_steps, SOUND)) == {"small-steps-disagree": (0, N)}
    assert seen(ask(small_steps, Stubborn())) == {}
    assert seen(ask(small_steps, lambda x: SOUND(x))) == {}
    assert next(SOUND.parameters()).dtype == torch.float32


def test_a_kink_is_no_wrong_derivative():
    """ReLUs: at a step of 1e-6 budgets next to no example lies on one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    assert seen(ask(small_steps, model, y=model(X).argmax(1))) == {"small-steps-disagree": (0, N)}


# Less and more.


def zigzag(x):
    """Of one pixel: up for 0.7 of a period, down for 0.3, and up again, with its highest point at the end of the budget.

    Ten steps of PGD are a period each, so they see the same slope again and again and walk to the end; forty are a quarter of
    one, too short to leap over the way down. Class 1 wins on the last peak alone.
    """
    period = 0.25 * EPS
    t = (x[:, 0, 0, 0] - 0.5 - EPS) / period + 0.7
    whole = t.detach().floor()
    part = t - whole
    height = 0.4 * whole + torch.where(part < 0.7, part, 1.4 - part)
    return torch.stack([torch.full_like(height, 0.5), height], 1)


def test_a_model_on_which_more_steps_leave_more():
    x = torch.full((N, 1, 4, 4), 0.5)
    result = ask(raw_runs, zigzag, x=x, y=torch.zeros(N, dtype=torch.int64))
    assert "more-steps-leave-more" in raised(result)
    hits, of = seen(result)["more-steps-leave-more"]
    # A random start lies on a way up with 0.7; forty steps arrive from the last of eight periods alone.
    assert 0.3 * N < hits <= of < 0.9 * N


def test_a_model_that_gives_up_its_secret_but_once():
    """After the first run it answers the same to everything: all that asks for more finds less."""
    tired = Counter(lambda out, calls: out if calls < 12 else 0 * out + torch.eye(3)[Y[: len(out)]])
    result = ask(raw_runs, tired, threat=Linf(0.3))
    assert raised(result) == {"more-steps-leave-more", "more-restarts-leave-more", "larger-eps-leaves-more"}
    fine = ask(raw_runs, threat=Linf(0.3))
    assert raised(fine) == set()
    assert seen(fine)["more-restarts-leave-more"][0] <= 3


def test_what_a_probe_breaks_counts():
    """Raw runs start from nothing, yet their finds are those of the run."""
    result = ask(raw_runs, threat=Linf(0.3))
    assert result.success.any()
    assert Linf(0.3).contains(result.x_adv, X).all()
    assert (SOUND(result.x_adv).argmax(1) != Y)[result.success].all()


def test_without_a_budget_every_point_is_in_reach():
    zero, one = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    for threat in (Linf(0.1), L2(0.1), L1(0.1), Pixels(1)):
        all_of_it = probes.everything(threat, zero)
        assert all_of_it.contains(one, zero).all()
        torch.testing.assert_close(all_of_it.size(one, zero), torch.full((2,), float(all_of_it.eps), dtype=torch.float64))
    wide = probes.everything(Linf(0.1, bounds=(-1.0, 3.0)), zero)
    assert wide.eps == 4.0
    assert wide.bounds == (-1.0, 3.0)


def test_a_sound_model_withstands_nothing_without_a_budget():
    for threat in (Linf(EPS), L2(0.3), L1(0.5), Pixels(2)):
        hits, of = seen(ask(unbounded, threat=threat))["unbounded-leaves-robust"]
        assert of == N
        assert hits <= 3


# Who is asked, and at what price.


def test_what_is_chosen_depends_on_no_other_example():
    found = {}

    def choose(problem):
        solved = problem.ids % 5 == 0
        problem._kept.open[solved] = False  # as if solved
        for purpose in ("one", "two"):
            rows = probes.chosen(problem, purpose, 0.25)
            found[len(problem), purpose] = set(problem.ids[rows].tolist())

    x, y = X.repeat(30, 1, 1, 1), Y.repeat(30)
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:200]
    target = Target(SOUND, batch_size=len(x))
    ask(choose, target, x=x, y=y)
    ask(choose, target, x=x[some], y=y[some], ids=some)
    for purpose in ("one", "two"):
        whole = found[len(x), purpose]
        assert found[200, purpose] == whole & set(some.tolist())
        assert not any(number % 5 == 0 for number in whole)
        assert len(whole) / (0.8 * len(x)) == pytest.approx(0.25, abs=0.05)
    assert found[len(x), "one"] != found[len(x), "two"]


def test_of_a_random_model_only_its_answers_are_looked_at_and_its_mean_gradient():
    class Noisy(nn.Module):
        def forward(self, x):
            return SOUND(x) + 1e-3 * torch.randn(len(x), 3)

    result = Audit()(Noisy(), X, Y, threat=Linf(EPS))
    answers = {"undefined-outputs", "saturated-outputs", "probabilities"}
    assert set(seen(result)) == {*answers, "unusual-range", "gradients-disagree"}
    assert raised(result) == set()


@pytest.mark.parametrize("attack", [Audit(), Standard()])
def test_autograd_that_fails_is_a_flag_and_no_end(attack):
    result = attack(BROKEN, X, Y, threat=Linf(0.3))
    assert "broken-autograd" in names(result.flags)
    assert result.success.any()  # by the search without gradients
    hits, of = seen(result)["broken-autograd"]
    assert hits == of > 0


@pytest.mark.parametrize(
    ("x", "model"),
    [
        (X[:1], SOUND),
        (torch.zeros(4, 1, 4, 4), SOUND),
        (X.double(), copy.deepcopy(SOUND).double()),
        (X, lambda x: SOUND(x)[:, :2]),
        (X, lambda x: 0 * SOUND(x) + torch.tensor([1.0, 0.0, 0.0])),
    ],
    ids=["one", "constant", "float64", "two classes", "constant answers"],
)
def test_the_audit_bears_the_corners_of_the_input_space(x, model):
    result = Audit(share=1.0)(model, x, model(x).argmax(1), threat=Linf(EPS))
    assert result.x_adv.isfinite().all()
    assert Linf(EPS).contains(result.x_adv, x).all()


@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.3)])
def test_the_whole_evaluation_believes_a_sound_model_and_doubts_a_masked_one(threat, monkeypatch):
    monkeypatch.setattr(_escalation, "_SCORES", 25)  # enough to see that it is done
    monkeypatch.setattr(_escalation, "_DECISIONS", 25)
    sound = Standard()(SOUND, X, Y, threat=threat)
    assert names(sound.flags) == set()
    assert "escalated" not in names(sound.notes)
    masked = Standard()(FLIPPED, X, Y, threat=threat)
    assert "gradients-disagree" in names(masked.flags)
    assert "escalated" in names(masked.notes)


def test_the_surrogate_of_the_goal_is_not_what_is_compared():
    """The gradient of the margin is: a loss that goes nowhere is no fault of the model."""
    flat = Misclassify(lambda out, ref: 0 * out[:, 0])
    assert raised(ask(agreement, goal=flat)) == set()


def test_bad_values_are_refused():
    with pytest.raises(ArgumentError, match="share=0"):
        Audit(share=0)
