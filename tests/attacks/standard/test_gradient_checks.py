"""The checks of the audit on sound and on masked models, and how its samples are drawn."""

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
    audit_flags,
    check_counts,
    check_derivative,
    check_gradient_free,
    check_gradients,
    check_unbounded,
    names,
    run_inside,
)
from torch import nn
from torch.nn import functional

from robustkit import L1, L2, Linf, Misclassify, Pixels, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard import escalation, gradient_checks
from robustkit.attacks.standard.audit import Audit
from robustkit.errors import ArgumentError

# Models that raise the flags.


class Scaled(torch.autograd.Function):
    """The identity, with its derivative multiplied by `scale`."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.scale, None


class Broken(torch.autograd.Function):
    """The identity, with a backward pass that raises an error."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no backward pass")


class Counter(nn.Module):
    """A network whose output depends on the number of calls."""

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


def centred_on_batch(x):
    return x - x.mean(0)


def alternating(out, calls):
    return out + torch.tensor([0.5, 0.0, -0.5]) * (-1) ** calls


@pytest.mark.parametrize(
    ("flag", "check", "model"),
    [
        ("gradients-disagree", check_gradients, DETACHED),
        ("gradients-disagree", check_gradients, FLIPPED),
        ("small-steps-disagree", check_derivative, DETACHED),
        ("small-steps-disagree", check_derivative, FLIPPED),
        ("saturated-outputs", gradient_checks.check_outputs, Masked(after=lambda out: 1e5 * out)),
        (
            "saturated-outputs",
            gradient_checks.check_outputs,
            Masked(after=lambda out: functional.one_hot(out.argmax(1), 3).float()),
        ),
        ("undefined-outputs", gradient_checks.check_outputs, Masked(after=some_undefined)),
        ("unsteady-answers", gradient_checks.check_consistency, Counter(alternating)),
        ("batch-dependent", gradient_checks.check_consistency, Masked(before=centred_on_batch)),
        ("unbounded-leaves-robust", check_unbounded, DETACHED),
        ("unbounded-leaves-robust", check_unbounded, FLIPPED),
        ("gradient-free-breaks", check_gradient_free, DETACHED),
    ],
)
def test_each_check_flags_the_masked_model_and_not_a_sound_one(flag, check, model):
    y = model(X).nan_to_num(-1e9).argmax(1) if check is not gradient_checks.check_consistency else Y
    # The sound model is tested with a budget so small that no attack solves any example.
    small = Linf(1e-4) if check is check_gradient_free else Linf(EPS)
    big = Linf(0.4) if check is check_gradient_free else Linf(EPS)
    assert audit_flags(run_inside(check, model, y=y, threat=big)) == {flag}
    result = run_inside(check, SOUND, threat=small)
    assert audit_flags(result) == set()
    assert flag in check_counts(result)


def test_a_logit_of_minus_infinity_is_undefined():
    disabled_class = Masked(after=lambda out: torch.cat([out, torch.full((len(out), 1), -torch.inf)], 1))
    assert audit_flags(run_inside(gradient_checks.check_outputs, disabled_class)) == {"undefined-outputs"}


def test_log_probabilities_are_not_noted_as_probabilities():
    assert names(run_inside(gradient_checks.check_outputs, Masked(after=lambda out: out.log_softmax(1))).notes) == set()


def test_probabilities_are_noted():
    assert names(run_inside(gradient_checks.check_outputs, Masked(after=lambda out: out.softmax(1))).notes) == {"probabilities"}
    assert names(run_inside(gradient_checks.check_outputs).notes) == set()
    # One-hot probabilities are flagged as saturated instead.
    hard = run_inside(gradient_checks.check_outputs, Masked(after=lambda out: (1e6 * out).softmax(1)))
    assert names(hard.notes) == set()
    assert audit_flags(hard) == {"saturated-outputs"}


@pytest.mark.parametrize(
    ("bounds", "noted"), [((0.0, 1.0), False), ((0.0, 255.0), False), ((-1.0, 1.0), False), ((-2.1, 2.6), True), (None, False)]
)
def test_unusual_bounds_are_noted(bounds, noted):
    result = run_inside(gradient_checks.check_input_range, threat=Linf(0.1, bounds=bounds))
    assert ("unusual-range" in names(result.notes)) is noted
    assert audit_flags(result) == set()


@pytest.mark.parametrize(
    ("shift", "scale", "noted"), [(0.5, 0.2, True), (0.3, 0.3, True), (0.0, 1.0, False), (0.0, 1 / 255, False)]
)
def test_images_without_bounds_that_look_normalised_are_noted(shift, scale, noted):
    """Values from 0.2 to 0.8, standardised in two ways, unchanged, and in byte range."""
    x = (X - shift) / scale
    result = run_inside(gradient_checks.check_input_range, threat=Linf(0.1, bounds=None), x=x)
    hits, of = check_counts(result)["unusual-range"]
    assert (hits > 0.9 * of) is noted
    assert noted or not hits
    # Latent vectors have no usual range.
    assert "unusual-range" not in check_counts(
        run_inside(gradient_checks.check_input_range, lambda z: z[:, :3], threat=Linf(0.1, bounds=None), x=X.flatten(1))
    )


# The comparison of gradients and finite differences.


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(1.0), Pixels(2), Linf(0.1, bounds=None), L2(0.5, bounds=None)])
def test_gradients_of_a_linear_model_agree_and_flipped_ones_disagree(threat):
    """Central differences of a linear function are its derivative, whatever the step size."""
    weight = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def linear(x):
        return x.flatten(1) @ weight

    def flipped(x):
        return Flip.apply(x.flatten(1)) @ weight

    y = linear(X).argmax(1)

    def faint(x):
        return Scaled.apply(x.flatten(1), 0.005) @ weight

    for model, disagree_count, faint_count in ((linear, 0, 0), (flipped, N, 0), (faint, 0, N)):
        expected = {"gradients-disagree": (disagree_count, N), "faint-gradients": (faint_count, N)}
        assert check_counts(run_inside(check_gradients, model, threat=threat, y=y)) == expected


def test_the_derivative_is_checked_only_where_the_model_can_be_converted_to_float64():
    class Float32Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(SOUND)

        def forward(self, x):
            return self.net(x.float())

    assert check_counts(run_inside(check_derivative, SOUND)) == {"small-steps-disagree": (0, N)}
    assert check_counts(run_inside(check_derivative, Float32Inside())) == {}
    assert check_counts(run_inside(check_derivative, lambda x: SOUND(x))) == {}
    assert next(SOUND.parameters()).dtype == torch.float32


def test_kinks_are_not_flagged_as_wrong_derivatives():
    """With ReLUs, hardly any example has a kink within 1e-6 budgets."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    assert check_counts(run_inside(check_derivative, model, y=model(X).argmax(1))) == {"small-steps-disagree": (0, N)}


# Samples, and models and inputs in general.


def test_the_sample_of_a_check_does_not_depend_on_other_examples():
    sampled = {}

    def sample(problem):
        solved = problem.ids % 5 == 0
        problem._best.unsolved[solved] = False  # as if solved
        for purpose in ("one", "two"):
            rows = gradient_checks.sample_rows(problem, purpose, 0.25)
            sampled[len(problem), purpose] = set(problem.ids[rows].tolist())

    x, y = X.repeat(30, 1, 1, 1), Y.repeat(30)
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:200]
    target = Target(SOUND, batch_size=len(x))
    run_inside(sample, target, x=x, y=y)
    run_inside(sample, target, x=x[part], y=y[part], ids=part)
    for purpose in ("one", "two"):
        whole = sampled[len(x), purpose]
        assert sampled[200, purpose] == whole & set(part.tolist())
        assert not any(number % 5 == 0 for number in whole)
        assert len(whole) / (0.8 * len(x)) == pytest.approx(0.25, abs=0.05)
    assert sampled[len(x), "one"] != sampled[len(x), "two"]


class Noisy(nn.Module):
    """The sound network plus noise, from torch's generator or another one."""

    def __init__(self, noise):
        super().__init__()
        self.net, self.noise = copy.deepcopy(SOUND), noise

    def forward(self, x):
        return self.net(x) + 1e-3 * self.noise(len(x), 3)


def unseeded(*shape):
    return torch.from_numpy(np.random.default_rng().normal(size=shape)).float()


def test_the_checks_that_support_random_models_are_run_on_one():
    result = Audit(share=1.0)(Noisy(torch.randn), X, Y, threat=Linf(EPS))
    outputs = {"undefined-outputs", "saturated-outputs", "probabilities", "unseeded-noise", "unusual-range"}
    gradients = {"gradients-disagree", "faint-gradients"}
    attacks = {"more-steps-leave-more", "more-restarts-leave-more", "larger-eps-leaves-more", "unbounded-leaves-robust"}
    assert set(check_counts(result)) == outputs | gradients | attacks
    assert audit_flags(result) == set()
    assert names(result.notes) == {"stochastic-target"}


def test_noise_from_an_unseeded_generator_is_recorded():
    def counts(noise):
        result = run_inside(gradient_checks.check_consistency, Target(Noisy(noise), stochastic=True))
        return check_counts(result)["unseeded-noise"]

    assert counts(torch.randn) == (0, N)
    hits, of = counts(unseeded)
    assert hits > of / 2


@pytest.mark.parametrize("attack", [Audit(), Standard()])
def test_an_error_in_autograd_is_flagged_and_does_not_end_the_run(attack):
    result = attack(BROKEN, X, Y, threat=Linf(0.3))
    assert "broken-autograd" in names(result.flags)
    assert result.success.any()  # by attacks without gradients
    hits, of = check_counts(result)["broken-autograd"]
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
    ids=["one", "constant", "float64", "two classes", "constant outputs"],
)
def test_the_audit_supports_degenerate_inputs_and_models(x, model):
    result = Audit(share=1.0)(model, x, model(x).argmax(1), threat=Linf(EPS))
    assert result.x_adv.isfinite().all()
    assert Linf(EPS).contains(result.x_adv, x).all()


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(EPS), L2(0.3)])
def test_the_evaluation_flags_a_masked_model_and_not_a_sound_one(threat, monkeypatch):
    monkeypatch.setattr(escalation, "_ATTEMPTS", ((25, 25),))  # a short escalation is enough
    monkeypatch.setattr(escalation, "_PATCH_QUERIES", 25)
    sound = Standard()(SOUND, X, Y, threat=threat)
    assert names(sound.flags) == set()
    assert "escalated" not in names(sound.notes)
    masked = Standard()(FLIPPED, X, Y, threat=threat)
    assert "gradients-disagree" in names(masked.flags)
    assert "escalated" in names(masked.notes)


def test_the_gradient_of_the_margin_is_checked_whatever_the_surrogate_of_the_goal():
    """A flat surrogate loss is not a defect of the model."""
    flat = Misclassify(lambda out, ref: 0 * out[:, 0])
    assert audit_flags(run_inside(check_gradients, goal=flat)) == set()


def test_invalid_values_are_refused():
    with pytest.raises(ArgumentError, match="share=0"):
        Audit(share=0)
