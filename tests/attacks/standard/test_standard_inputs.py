"""`Standard` on models, images and labels that are unusual or wrong: a result that can be believed, or one clear sentence."""

import math

import pytest
import torch
from torch import nn

from robustkit import L2, PGD, Linf, Target
from robustkit.attacks import Standard
from robustkit.errors import ArgumentError, ShapeError

QUICK = Standard(audit=False)  # the evidence of the audit has its own tests


class Then(nn.Module):
    """A linear net whose logits (N, classes) go through a function."""

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


def nearest(net, y):
    """The least change in Linf that reaches another class of a linear net, closed form, without the box."""
    weight, bias = net.net.weight.detach().double(), net.net.bias.detach().double()
    logits = X.flatten(1).double() @ weight.T + bias
    ahead = logits.gather(1, y[:, None]) - logits
    slope = (weight[y][:, None] - weight).abs().sum(2)
    return torch.where(torch.arange(len(weight)) == y[:, None], math.inf, ahead / slope).amin(1)


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("share", [0.99, 1.01])
def test_few_classes_are_solved_where_the_closed_form_says(classes, share):
    """Losses that look at the third or fourth logit must do without it."""
    net = Then(classes)
    y = labels(net)
    result = QUICK(net, X, y, threat=Linf(nearest(net, y) * share, None))
    assert result.success.tolist() == [share > 1] * len(X)
    assert not result.flags


def test_one_class_is_refused_with_the_way_out():
    net = Then(1)
    y = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"one column, \(6, 1\).* C >= 2.* torch.cat\(\[torch.zeros_like\(s\), s\], 1\)"):
        Standard()(net, X, y, threat=Linf(0.1))
    Standard()(Then(1, lambda s: torch.cat([torch.zeros_like(s), s], 1)), X, y, threat=Linf(0.1))  # it works


def test_no_image_and_one_image():
    net = Then()
    y = labels(net)
    none = Standard()(net, X[:0], y[:0], threat=Linf(0.1))
    assert (none.x_adv.shape, len(none.success)) == ((0, 1, 6, 6), 0)
    whole = QUICK(net, X, y, threat=Linf(0.1))
    one = QUICK(net, X[:1], y[:1], threat=Linf(0.1))
    assert torch.equal(one.success, whole.success[:1])
    torch.testing.assert_close(one.x_adv, whole.x_adv[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)])
def test_other_types_of_numbers_give_what_the_deployed_model_says_in_them(dtype, threat):
    net, x = Then(dtype=dtype), X.to(dtype)
    y = labels(net, x)
    result = Standard()(net, x, y, threat=threat)
    assert result.x_adv.dtype == dtype
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)
    assert ("half-precision" in {note.name for note in result.notes}) == (dtype != torch.float64)
    plain = Then()
    distance = nearest(plain, labels(plain))
    if isinstance(threat, Linf):  # far from the border the type does not matter
        assert result.success[distance < 0.09].all()
        assert not result.success[distance > 0.11].any()


def spoiled(value, right):
    """A number in the place of the logit of the first class, or of one behind it."""

    def after(out):
        place = out.argmax(1) if right else (out.argmax(1) + 1) % out.shape[1]
        return out.scatter(1, place[:, None], value)

    return after


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2)])
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_named_counted_and_never_robust(value, right, attack):
    net = Then(after=spoiled(value, right))
    result = attack(net, X, labels(net), threat=Linf(0.01))
    assert result.success.all()
    (seen,) = [one for one in result.checks if one.name == "undefined-outputs"]
    assert (seen.hits, seen.of, seen.limit) == (6, 6, 0.0)
    (flag,) = [flag for flag in result.flags if flag.name == "undefined-outputs"]
    assert "6 of 6" in flag.why


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2, random_start=False)])
def test_numbers_that_end_at_the_edge_of_the_data_are_counted_where_the_attack_ends(attack):
    """At the images all is well; whatever is brighter overflows."""
    most = X.flatten(1).sum(1).max()

    def net(x):
        out = torch.stack([1 - x.flatten(1).sum(1) * 1e-3, x.flatten(1).sum(1) * 0], 1)
        return torch.where((x.flatten(1).sum(1) > most + 0.3)[:, None], math.nan, out)

    result = attack(net, X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))
    lost = net(result.x_adv).isnan().any(1)
    assert lost.any()
    assert torch.equal(result.success, lost)
    assert "undefined-outputs" in {flag.name for flag in result.flags}


def test_answers_without_any_number_are_wrong_answers():
    net = Then(after=lambda out: out * 0 - math.inf)
    result = Standard()(net, X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))  # argmax would name class 0
    assert result.success.all()
    assert "undefined-outputs" in {flag.name for flag in result.flags}


@pytest.mark.parametrize("attack", [QUICK, PGD(steps=2)])
def test_classes_that_are_level_are_decided_by_argmax_and_told(attack):
    """The deployed function names the first class, so that is its answer; but what the order decides is not robust."""
    net = Then(after=lambda out: out * 0)
    y = torch.tensor([0, 0, 0, 0, 1, 2])
    result = attack(net, X, y, threat=Linf(0.1))
    assert torch.equal(result.success, y != 0)
    (seen,) = [one for one in result.checks if one.name == "tied-outputs"]
    assert (seen.hits, seen.of, seen.limit) == (4, 4, 0.01)
    assert "tied-outputs" in {flag.name for flag in result.flags}
    assert "flat-gradients" in {flag.name for flag in result.flags}


def test_of_random_answers_a_single_tie_decides_nothing():
    net = Then(after=lambda out: nn.functional.dropout(out, 0.9))
    result = PGD(steps=2)(net, X, labels(net), threat=Linf(0.01))
    assert "tied-outputs" not in {one.name for one in result.checks}


def test_sound_models_give_no_evidence_of_any_of_this():
    net = Then()
    assert PGD(steps=2)(net, X, labels(net), threat=Linf(0.01)).checks == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda y: y + 1, r"labels run from \d to 3, but the model has 3 classes: they must lie in \[0, 3\)"),
        (lambda y: y - 3, r"labels run from -\d to -1"),
        (lambda y: y.int(), "labels must be int64"),
        (lambda y: y.float(), "labels must be int64"),
        (lambda y: y[:3], "one row per example"),
        (lambda y: nn.functional.one_hot(y), "labels must be int64"),
    ],
)
def test_labels_that_are_none_are_refused(change, told):
    net = Then(3)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ShapeError, match=told):
        Standard()(net, X, change(y), threat=Linf(0.1))


def test_a_label_that_is_out_of_range_in_a_later_batch_is_refused_too():
    y = torch.tensor([0, 1, 2, 0, 1, 3])
    with pytest.raises(ShapeError, match="from 1 to 3"):
        Standard()(Target(Then(), batch_size=2), X, y, threat=Linf(0.1))


@pytest.mark.parametrize("x", [X * 255, X - 1, X / 0, X * math.nan])
def test_images_out_of_bounds_are_refused(x):
    with pytest.raises(ArgumentError, match=r"x has values from .* outside bounds=\(0.0, 1.0\); pass unnormalised images"):
        Standard()(Then(), x, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))


@pytest.mark.parametrize("after", [lambda out: (out, out), lambda out: [out], lambda out: {"logits": out}])
def test_a_model_that_returns_more_than_logits_is_refused_with_the_way_out(after):
    """Which of several outputs decides is not for an attack to guess: a detector's score may come first."""
    with pytest.raises(ShapeError, match=r"the model returned (tuple|list|dict); .* such as lambda x: model\(x\)\[0\]"):
        Standard()(Then(after=after), X, torch.zeros(6, dtype=torch.int64), threat=Linf(0.1))
    net = Then(after=lambda out: (out, out))
    y = labels(net)
    one, other = (Standard()(fn, X, y, threat=Linf(0.1)) for fn in (lambda x: net(x)[0], Then()))
    assert torch.equal(one.x_adv, other.x_adv)


@pytest.mark.parametrize("attack", [Standard(), PGD(steps=2)])
def test_probabilities_are_recognised_and_log_probabilities_are_logits(attack):
    for after, told in ((lambda out: out.softmax(1), True), (lambda out: out.log_softmax(1), False)):
        net = Then(after=after)
        result = attack(net, X, labels(net), threat=Linf(0.1))
        assert ("probabilities" in {note.name for note in result.notes}) == told


@pytest.mark.parametrize("n", [1, 6])
def test_a_model_that_fails_on_a_batch_of_one_is_asked_about_two(n):
    def picky(out):
        if len(out) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return out

    net, y = Then(after=picky), labels(Then())[:n]
    result = Standard()(net, X[:n], y, threat=Linf(0.1))
    assert torch.equal(result.success, Standard()(Then(), X[:n], y, threat=Linf(0.1)).success)
    (note,) = [note for note in result.notes if note.name == "fails-alone"]
    assert "Expected more than 1 value per channel" in note.why
