"""`Standard` on unusual or invalid models, images and labels: a correct result, or an error in one clear sentence."""

import math

import pytest
import torch
from torch import nn

from robustkit import L2, PGD, Linf, Target
from robustkit.attacks import Standard
from robustkit.errors import ArgumentError, ShapeError

WITHOUT_AUDIT = Standard(audit=False)


class Linear(nn.Module):
    """A linear model whose logits, (N, classes), are passed through `after`."""

    def __init__(self, classes=3, after=lambda out: out, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(classes)
        self.net, self.after = nn.Linear(36, classes).to(dtype), after
        self.eval()

    def forward(self, x):
        return self.after(self.net(x.flatten(1)))


X = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def labels(net, x=X):
    with torch.no_grad():
        return net.net(x.flatten(1)).argmax(1)


def distance_of(net, y):
    """The Linf distance to another class of a linear model, (N,), in closed form and without the box."""
    weight, bias = net.net.weight.detach().double(), net.net.bias.detach().double()
    logits = X.flatten(1).double() @ weight.T + bias
    margins = logits.gather(1, y[:, None]) - logits
    slope = (weight[y][:, None] - weight).abs().sum(2)
    return torch.where(torch.arange(len(weight)) == y[:, None], math.inf, margins / slope).amin(1)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_with_few_classes_success_is_that_of_the_closed_form(classes, share):
    """Losses that read the third or fourth logit need a form without it."""
    net = Linear(classes)
    y = labels(net)
    result = WITHOUT_AUDIT(net, X, y, threat=Linf(distance_of(net, y) * share, None))
    assert result.success.tolist() == [share > 1] * len(X)
    assert not result.flags


def test_one_class_is_refused_with_advice():
    net = Linear(1)
    y = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"one column, \(6, 1\).* C >= 2.* torch.cat\(\[torch.zeros_like\(s\), s\], 1\)"):
        Standard()(net, X, y, threat=Linf(0.1))
    Standard()(Linear(1, lambda s: torch.cat([torch.zeros_like(s), s], 1)), X, y, threat=Linf(0.1))  # the advice works


def test_empty_batches_and_batches_of_one():
    net = Linear()
    y = labels(net)
    empty = Standard()(net, X[:0], y[:0], threat=Linf(0.1))
    assert (empty.x_adv.shape, len(empty.success)) == ((0, 1, 6, 6), 0)
    whole = WITHOUT_AUDIT(net, X, y, threat=Linf(0.1))
    one = WITHOUT_AUDIT(net, X[:1], y[:1], threat=Linf(0.1))
    assert torch.equal(one.success, whole.success[:1])
    torch.testing.assert_close(one.x_adv, whole.x_adv[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
def test_other_dtypes_are_evaluated_on_the_deployed_model_in_their_precision(dtype, threat):
    net, x = Linear(dtype=dtype), X.to(dtype)
    y = labels(net, x)
    result = Standard()(net, x, y, threat=threat)
    assert result.x_adv.dtype == dtype
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)
    assert ("half-precision" in {note.name for note in result.notes}) == (dtype != torch.float64)
    float32 = Linear()
    distance = distance_of(float32, labels(float32))
    if isinstance(threat, Linf):  # far from the boundary the precision does not matter
        assert result.success[distance < 0.09].all()
        assert not result.success[distance > 0.11].any()


def replace_logit(value, predicted):
    """A function that sets the logit of the predicted class, or of the one after it, to `value`."""

    def after(out):
        column = out.argmax(1) if predicted else (out.argmax(1) + 1) % out.shape[1]
        return out.scatter(1, column[:, None], value)

    return after


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2)])
@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_undefined_logits_are_flagged_counted_and_never_robust(value, predicted, attack):
    net = Linear(after=replace_logit(value, predicted))
    result = attack(net, X, labels(net), threat=Linf(0.01))
    assert result.success.all()
    (check,) = [check for check in result.checks if check.name == "undefined-outputs"]
    assert (check.hits, check.of, check.limit) == (6, 6, 0.0)
    (flag,) = [flag for flag in result.flags if flag.name == "undefined-outputs"]
    assert "6 of 6" in flag.why


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2, random_start=False)])
def test_outputs_that_are_undefined_only_at_adversarial_points_are_flagged(attack):
    """The outputs are defined at the images, but not for brighter inputs."""
    largest = X.flatten(1).sum(1).max()

    def net(x):
        out = torch.stack([1 - x.flatten(1).sum(1) * 1e-3, x.flatten(1).sum(1) * 0], 1)
        return torch.where((x.flatten(1).sum(1) > largest + 0.3)[:, None], math.nan, out)

    result = attack(net, X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))
    undefined = net(result.x_adv).isnan().any(1)
    assert undefined.any()
    assert torch.equal(result.success, undefined)
    assert "undefined-outputs" in {flag.name for flag in result.flags}


def test_outputs_without_a_finite_logit_count_as_wrong():
    net = Linear(after=lambda out: out * 0 - math.inf)
    result = Standard()(net, X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))  # argmax would return class 0
    assert result.success.all()
    assert "undefined-outputs" in {flag.name for flag in result.flags}


@pytest.mark.parametrize("attack", [WITHOUT_AUDIT, PGD(steps=2)])
def test_tied_classes_are_resolved_by_argmax_and_flagged(attack):
    """The prediction of the deployed model is the first class; an accuracy that depends on this order is flagged."""
    net = Linear(after=lambda out: out * 0)
    y = torch.tensor([0, 0, 0, 0, 1, 2])
    result = attack(net, X, y, threat=Linf(0.1))
    assert torch.equal(result.success, y != 0)
    (check,) = [check for check in result.checks if check.name == "tied-outputs"]
    assert (check.hits, check.of, check.limit) == (4, 4, 0.01)
    assert "tied-outputs" in {flag.name for flag in result.flags}
    assert "flat-gradients" in {flag.name for flag in result.flags}


def test_single_ties_of_a_random_model_are_not_recorded():
    net = Linear(after=lambda out: nn.functional.dropout(out, 0.9))
    result = PGD(steps=2)(net, X, labels(net), threat=Linf(0.01))
    assert "tied-outputs" not in {check.name for check in result.checks}


def test_no_check_is_recorded_for_a_sound_model():
    net = Linear()
    assert PGD(steps=2)(net, X, labels(net), threat=Linf(0.01)).checks == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1, r"labels run from \d to 3, but the model has 3 classes: they must lie in \[0, 3\)"),
        (lambda y: y - 3, r"labels run from -\d to -1"),
        (lambda y: y.int(), "labels must be int64"),
        (lambda y: y.float(), "labels must be int64"),
        (lambda y: y[:3], "one row per example"),
        (lambda y: nn.functional.one_hot(y), "labels must be int64"),
    ],
)
def test_invalid_labels_are_refused(change, message):
    net = Linear(3)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ShapeError, match=message):
        Standard()(net, X, change(y), threat=Linf(0.1))


def test_a_label_out_of_range_in_a_later_batch_is_refused():
    y = torch.tensor([0, 1, 2, 0, 1, 3])
    with pytest.raises(ShapeError, match="from 1 to 3"):
        Standard()(Target(Linear(), batch_size=2), X, y, threat=Linf(0.1))


@pytest.mark.parametrize("x", [X * 255, X - 1, X / 0, X * math.nan])
def test_images_out_of_bounds_are_refused(x):
    with pytest.raises(ArgumentError, match=r"x has values from .* outside bounds=\(0.0, 1.0\); pass unnormalised images"):
        Standard()(Linear(), x, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))


@pytest.mark.parametrize("after", [lambda out: (out, out), lambda out: [out], lambda out: {"logits": out}])
def test_a_model_with_several_outputs_is_refused_with_advice(after):
    """An attack cannot know which output holds the logits: a detector's score may come first."""
    with pytest.raises(ShapeError, match=r"the model returned (tuple|list|dict); .* such as lambda x: model\(x\)\[0\]"):
        Standard()(Linear(after=after), X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))
    net = Linear(after=lambda out: (out, out))
    y = labels(net)
    first_output, plain = (Standard()(fn, X, y, threat=Linf(0.1)) for fn in (lambda x: net(x)[0], Linear()))
    assert torch.equal(first_output.x_adv, plain.x_adv)


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2)])
def test_probabilities_are_noted_and_log_probabilities_count_as_logits(attack):
    for after, noted in ((lambda out: out.softmax(1), True), (lambda out: out.log_softmax(1), False)):
        net = Linear(after=after)
        result = attack(net, X, labels(net), threat=Linf(0.1))
        assert ("probabilities" in {note.name for note in result.notes}) == noted


@pytest.mark.parametrize("n", [1, 6])
def test_a_model_that_fails_on_a_batch_of_one_gets_two_copies(n):
    def fails_alone(out):
        if len(out) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return out

    net, y = Linear(after=fails_alone), labels(Linear())[:n]
    result = Standard()(net, X[:n], y, threat=Linf(0.1))
    assert torch.equal(result.success, Standard()(Linear(), X[:n], y, threat=Linf(0.1)).success)
    (note,) = [note for note in result.notes if note.name == "fails-alone"]
    assert "Expected more than 1 value per channel" in note.why
