import copy

import numpy as np
import pytest
import torch
from small_problems import (
    EPS,
    FLIPPED,
    SOUND,
    Flip,
    Masked,
    N,
    X,
    Y,
    agreement,
    ask,
    names,
    raised,
    seen,
    small_steps,
    survivors,
    unbounded,
)
from torch import nn
from torch.nn import functional

from robustkit import L1, L2, Linf, Misclassify, Pixels, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard import escalation as _escalation
from robustkit.attacks.standard import gradient_checks as probes
from robustkit.attacks.standard.audit import Audit
from robustkit.errors import ArgumentError

# The models that the probes are for.


class Scaled(torch.autograd.Function):
    """The identity, with another derivative."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


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


def test_an_infinite_minus_for_a_class_that_is_closed_is_undefined():
    closed = Masked(after=lambda out: torch.cat([out, torch.full((len(out), 1), -torch.inf)], 1))
    assert raised(ask(probes.answers, closed)) == {"undefined-outputs"}


def test_log_probabilities_are_no_probabilities():
    assert names(ask(probes.answers, Masked(after=lambda out: out.log_softmax(1))).notes) == set()


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
    result = ask(probes.ordinary, threat=Linf(0.1, bounds=bounds))
    assert ("unusual-range" in names(result.notes)) is told
    assert raised(result) == set()


@pytest.mark.parametrize(
    ("shift", "scale", "told"), [(0.5, 0.2, True), (0.3, 0.3, True), (0.0, 1.0, False), (0.0, 1 / 255, False)]
)
def test_images_without_bounds_that_look_normalised_are_noted(shift, scale, told):
    """Of values from 0.2 to 0.8: standardised in two ways, as they are, and as bytes."""
    x = (X - shift) / scale
    result = ask(probes.ordinary, threat=Linf(0.1, bounds=None), x=x)
    hits, of = seen(result)["unusual-range"]
    assert (hits > 0.9 * of) is told
    assert told or not hits
    # Latent vectors have no such range.
    assert "unusual-range" not in seen(ask(probes.ordinary, lambda z: z[:, :3], threat=Linf(0.1, bounds=None), x=X.flatten(1)))


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

    def faint(x):
        return Scaled.apply(x.flatten(1), 0.005) @ weight

    for model, hits, next_to_nothing in ((linear, 0, 0), (flipped, N, 0), (faint, 0, N)):
        found = {"gradients-disagree": (hits, N), "faint-gradients": (next_to_nothing, N)}
        assert seen(ask(agreement, model, threat=threat, y=y)) == found


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


# Who is asked, and at what price.


def test_what_is_chosen_depends_on_no_other_example():
    found = {}

    def choose(problem):
        solved = problem.ids % 5 == 0
        problem._kept.unsolved[solved] = False  # as if solved
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


class Noisy(nn.Module):
    """A net in front of noise that `torch` can seed, or that nobody can."""

    def __init__(self, noise):
        super().__init__()
        self.net, self.noise = copy.deepcopy(SOUND), noise

    def forward(self, x):
        return self.net(x) + 1e-3 * self.noise(len(x), 3)


def unseeded(*shape):
    return torch.from_numpy(np.random.default_rng().normal(size=shape)).float()


def test_what_can_be_asked_of_a_random_model_is_asked():
    result = Audit(share=1.0)(Noisy(torch.randn), X, Y, threat=Linf(EPS))
    answers = {"undefined-outputs", "saturated-outputs", "probabilities", "unseeded-noise", "unusual-range"}
    gradients = {"gradients-disagree", "faint-gradients"}
    trials = {"more-steps-leave-more", "more-restarts-leave-more", "larger-eps-leaves-more", "unbounded-leaves-robust"}
    assert set(seen(result)) == answers | gradients | trials
    assert raised(result) == set()
    assert names(result.notes) == {"stochastic-target"}


def test_noise_that_nobody_can_seed_is_noted():
    def seen_of(noise):
        return seen(ask(probes.company, Target(Noisy(noise), stochastic=True)))["unseeded-noise"]

    assert seen_of(torch.randn) == (0, N)
    hits, of = seen_of(unseeded)
    assert hits > of / 2


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
    monkeypatch.setattr(_escalation, "_TURNS", ((25, 25),))  # enough to see that it is done
    monkeypatch.setattr(_escalation, "_WINDOWS", 25)
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
