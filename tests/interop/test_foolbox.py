"""Attacks are converted between foolbox and this package: results are equal, queries counted, failures not believed."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from counting import Counting
from torch import nn

from robustkit import FGSM, L1, L2, PGD, ClassifyAs, Linf, Misclassify, Pixels, Target
from robustkit._engine.state_guard import random_state
from robustkit.errors import ArgumentError, MissingExtraError, ShapeError
from robustkit.interop.foolbox import from_foolbox, to_foolbox
from robustkit.interop.peers import load_foolbox
from robustkit.losses import margin
from robustkit.threats import Threat

fb = load_foolbox()
EPSILONS = [1 / 255, 0.05, 0.2]


def fmodel_of(net, bounds=(0, 1)):
    return fb.PyTorchModel(net, bounds=bounds, device="cpu")


# our attacks in foolbox


@pytest.mark.parametrize("attack", [FGSM(), PGD(steps=5), PGD(steps=5, random_start=False)], ids=repr)
@pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0), L1(1.0)], ids=lambda t: type(t).__name__)
def test_foolbox_returns_what_the_attack_returns(trained, attack, threat):
    net, x, y = trained
    raw, clipped, success = to_foolbox(attack, threat=threat, seed=3)(fmodel_of(net), x, y, epsilons=EPSILONS)
    for i, eps in enumerate(EPSILONS):
        direct = attack(net, x, y, threat=type(threat)(eps), seed=3)
        assert torch.equal(raw[i], direct.x_adv)
        assert (clipped[i] - direct.x_adv).abs().max() < 1e-6
        assert (
            success[i] == direct.success
        ).float().mean() > 0.98  # foolbox's clipping may change an image near the decision boundary
    alone = to_foolbox(attack, threat=threat, seed=3)(fmodel_of(net), x, y, epsilons=EPSILONS[1])
    assert torch.equal(alone[0], raw[1])
    assert torch.equal(alone[2], success[1])


def test_pgd_equals_foolbox_bit_for_bit_under_its_own_interface(trained):
    net, x, y = trained
    ours = to_foolbox(PGD(random_start=False), threat=Linf(1.0), keep="last")
    theirs = fb.attacks.LinfPGD(rel_stepsize=2.5 / 40, random_start=False)
    for mine, yours in zip(*(a(fmodel_of(net), x, y, epsilons=EPSILONS) for a in (ours, theirs)), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, yours, strict=True))


def test_targeted_misclassification_is_the_goal_classify_as(trained):
    net, x, y = trained
    target_class = (y + 1) % 10
    raw, _, success = to_foolbox(PGD(), threat=Linf(1.0))(
        fmodel_of(net), x, fb.TargetedMisclassification(target_class), epsilons=0.2
    )
    assert torch.equal(raw, PGD()(net, x, target_class, goal=ClassifyAs(), threat=Linf(0.2)).x_adv)
    assert torch.equal(success, net(raw).argmax(1) == target_class)


def test_the_loss_is_that_of_the_goal(trained):
    net, x, y = trained
    goal = Misclassify(margin)
    raw, _, _ = to_foolbox(PGD(), threat=Linf(1.0), goal=goal, keep="last")(fmodel_of(net), x, y, epsilons=0.05)
    assert torch.equal(raw, PGD()(net, x, y, goal=goal, threat=Linf(0.05), keep="last").x_adv)
    assert not torch.equal(raw, PGD()(net, x, y, threat=Linf(0.05), keep="last").x_adv)


def test_repeats_are_the_best_of_separate_seeds(trained):
    net, x, y = trained
    attack = to_foolbox(PGD(steps=1, reach=0.1), threat=Linf(1.0), seed=7)
    raw, _, success = attack.repeat(3)(fmodel_of(net), x, y, epsilons=[0.2, 0.3])
    assert all(
        torch.equal(a, b) for a, b in zip(attack.repeat(3)(fmodel_of(net), x, y, epsilons=[0.2, 0.3])[0], raw, strict=True)
    )
    for i, eps in enumerate([0.2, 0.3]):
        separate = [
            to_foolbox(PGD(steps=1, reach=0.1), threat=Linf(1.0), seed=seed)(fmodel_of(net), x, y, epsilons=eps)
            for seed in (7, 8, 9)
        ]
        wins = torch.stack([s[2] for s in separate])
        assert torch.equal(success[i], wins.any(0))
        assert int(wins.any(0).sum()) > int(wins.sum(1).max())  # detects repeated random numbers
        first = wins.int().argmax(0)  # the first success, else the first repeat
        assert torch.equal(raw[i], torch.stack([s[0] for s in separate])[first, torch.arange(len(x))])


def test_repeats_of_repeats_multiply(trained):
    net, x, y = trained
    attack = to_foolbox(PGD(steps=1, reach=0.1), threat=Linf(1.0))
    six, two_by_three = (a(fmodel_of(net), x, y, epsilons=0.3)[2] for a in (attack.repeat(6), attack.repeat(2).repeat(3)))
    assert torch.equal(six, two_by_three)
    assert int(six.sum()) > int(attack.repeat(2)(fmodel_of(net), x, y, epsilons=0.3)[2].sum())


def test_pixels_are_counted_as_locations(trained):
    net = nn.Sequential(nn.Conv2d(3, 1, 1), trained[0]).eval()
    torch.manual_seed(0)
    x = torch.rand(16, 3, 8, 8)
    y = net(x).argmax(1)
    attack = to_foolbox(PGD(), threat=Pixels(1))
    raw, clipped, success = attack(fmodel_of(net), x, y, epsilons=[1, 20])
    for i, eps in enumerate((1, 20)):
        assert torch.equal(raw[i], clipped[i])
        assert ((raw[i] != x).any(1).flatten(1).sum(1) <= eps).all()
        assert torch.equal(success[i], net(raw[i]).argmax(1) != y)
    assert (fb.distances.l0(x, raw[1]) > 20).any()  # foolbox counts values, not locations
    assert torch.equal(attack.distance(x, raw[1]), (raw[1] != x).any(1).flatten(1).sum(1).float())
    with pytest.raises(ArgumentError, match="cannot shrink"):
        attack.distance.clip_perturbation(x, torch.zeros_like(x), 1)


def test_the_bounds_are_those_of_the_model(trained):
    net, x, y = trained
    bytes_net = nn.Sequential(Divide(), net).eval()
    raw, _, _ = to_foolbox(PGD(), threat=Linf(1.0))(fmodel_of(bytes_net, (0, 255)), x * 255, y, epsilons=[8.0])
    assert torch.equal(raw[0], PGD()(bytes_net, x * 255, y, threat=Linf(8.0, bounds=(0, 255))).x_adv)
    assert raw[0].max() > 1


class Divide(nn.Module):
    def forward(self, x):
        return x / 255


def test_epsilon_zero_returns_the_inputs(trained):
    net, x, y = trained
    raw, _, success = to_foolbox(PGD(), threat=Linf(1.0))(fmodel_of(net), x, y, epsilons=[0.0])
    assert torch.equal(raw[0], x)
    assert torch.equal(success[0], net(x).argmax(1) != y)


@pytest.mark.parametrize(
    ("keywords", "criterion", "why"),
    [
        ({}, lambda y: fb.Misclassification(y) & fb.TargetedMisclassification(y), "has no loss"),
        ({"goal": ClassifyAs()}, lambda y: y, "does not match the criterion"),
    ],
)
def test_unsupported_criteria_are_refused(trained, keywords, criterion, why):
    net, x, y = trained
    with pytest.raises(ArgumentError, match=why):
        to_foolbox(PGD(), threat=Linf(1.0), **keywords)(fmodel_of(net), x, criterion(y), epsilons=0.1)


@pytest.mark.parametrize(
    ("attack", "keywords"),
    [
        (PGD, {}),
        (PGD(), {"threat": 0.1}),
        (PGD(), {"keep": "worst"}),
        (PGD(), {"goal": "misclassify"}),
    ],
)
def test_invalid_arguments_are_refused_at_once(attack, keywords):
    with pytest.raises(ArgumentError):
        to_foolbox(attack, **{"threat": Linf(0.1), **keywords})


def test_arrays_of_other_frameworks_are_refused(trained):
    net, x, y = trained
    model = fb.NumPyModel(lambda z: net(torch.as_tensor(z)).detach().numpy(), bounds=(0, 1))
    with pytest.raises(ArgumentError, match="must be torch tensors"):
        to_foolbox(PGD(), threat=Linf(1.0))(model, x.numpy(), y.numpy(), epsilons=0.1)


# attacks of foolbox in robustkit

WRAPPED = {
    "pgd": (fb.attacks.LinfPGD(steps=5), Linf(0.1), Misclassify()),
    "repeated": (fb.attacks.LinfPGD(steps=3).repeat(2), Linf(0.1), ClassifyAs()),
    "noise": (fb.attacks.LinfRepeatedAdditiveUniformNoiseAttack(repeats=4), Linf(0.3), Misclassify()),
    "deepfool": (fb.attacks.L2DeepFoolAttack(steps=5), L2(1.0), Misclassify()),
    "cw": (fb.attacks.L2CarliniWagnerAttack(steps=10, binary_search_steps=2), L2(1.0), Misclassify()),
    "ddn": (fb.attacks.DDNAttack(steps=10), L2(1.0), ClassifyAs()),
    "boundary": (fb.attacks.BoundaryAttack(steps=10), L2(3.0), Misclassify()),
    "ead": (fb.attacks.EADAttack(steps=10, binary_search_steps=2), L1(5.0), Misclassify()),
    "fmn-l0": (fb.attacks.L0FMNAttack(steps=10), Pixels(5), Misclassify()),
    "gen": (fb.attacks.GenAttack(steps=5, population=6), Linf(0.2), ClassifyAs()),
}


def ref_of(goal, y):
    return (y + 1) % 10 if isinstance(goal, ClassifyAs) else y


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("keep", ["first", "last", "smallest"])
def test_success_matches_the_model_inside_the_threat(trained, name, keep):
    (attack, threat, goal), (net, x, y) = WRAPPED[name], trained
    x, ref = x[:24], ref_of(goal, y[:24])
    result = from_foolbox(attack)(net, x, ref, goal=goal, threat=threat, keep=keep)
    assert torch.equal(result.success, goal.success(net(result.x_adv), ref))
    assert threat.contains(result.x_adv, x).all()


@pytest.mark.parametrize("name", WRAPPED)
def test_every_query_is_counted(trained, name):
    (attack, threat, goal), (net, x, y) = WRAPPED[name], trained
    counting = Counting(net).eval()
    result = from_foolbox(attack)(Target(counting, batch_size=10), x[:24], ref_of(goal, y[:24]), goal=goal, threat=threat)
    assert int(result.forwards.sum()) == counting.forwards
    assert int(result.backwards.sum()) == counting.backwards
    assert (result.forwards > 0).all()


@pytest.mark.parametrize("name", WRAPPED)
def test_model_and_random_state_are_restored(trained, name):
    (attack, threat, goal), (net, x, y) = WRAPPED[name], trained
    net = copy.deepcopy(net).train()
    net[0].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before, state = copy.deepcopy(net.state_dict()), random_state()
    for target in (net, lambda z: net(z)):  # a plain function, whose parameters cannot be frozen
        from_foolbox(attack)(target, x[:8], ref_of(goal, y[:8]), goal=goal, threat=threat)
        assert all((p.grad == 0.5).all() and p.requires_grad for p in net.parameters())
        assert [part.training for part in net] == [False] + [True] * 6
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        assert random_state() == state


@pytest.mark.parametrize("name", ["pgd", "noise", "boundary", "gen"])
def test_results_depend_only_on_the_seed(trained, name):
    (attack, threat, goal), (net, x, y) = WRAPPED[name], trained

    def bytes_of(seed):
        torch.rand(7)
        return from_foolbox(attack)(net, x[:24], ref_of(goal, y[:24]), goal=goal, threat=threat, seed=seed, keep="last").x_adv

    assert torch.equal(bytes_of(0), bytes_of(0))
    assert not torch.equal(bytes_of(0), bytes_of(1))


@pytest.mark.parametrize("criterion", [fb.Misclassification, fb.TargetedMisclassification])
def test_results_equal_those_of_foolbox(trained, criterion, recwarn):
    net, x, y = trained
    goal = ClassifyAs() if criterion is fb.TargetedMisclassification else Misclassify()
    attack = fb.attacks.LinfPGD(random_start=False)
    theirs = attack(fmodel_of(net), x, criterion(y), epsilons=0.1)
    ours = from_foolbox(attack)(net, x, y, goal=goal, threat=Linf(0.1), keep="last")
    assert torch.equal(ours.x_adv, theirs[0])
    assert torch.equal(ours.success, theirs[2])
    assert not recwarn.list  # foolbox warns about models in training mode despite filters


def test_converting_to_foolbox_and_back_gives_the_same_attack(trained):
    net, x, y = trained
    round_trip = from_foolbox(to_foolbox(PGD(), threat=Linf(1.0), keep="last"))
    direct, wrapped = (a(net, x, y, threat=Linf(0.1), keep="last") for a in (PGD(), round_trip))
    assert torch.equal(direct.x_adv, wrapped.x_adv)


@pytest.mark.parametrize(
    ("attack", "threat"),
    [
        (fb.attacks.L2CarliniWagnerAttack(steps=2, binary_search_steps=1), L2(0.05)),
        (fb.attacks.EADAttack(steps=2, binary_search_steps=1), L1(0.05)),
    ],
)
def test_black_images_that_foolbox_reports_are_no_successes(trained, attack, threat):
    net, x, y = trained
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    claimed = attack(fmodel_of(net), x, y, epsilons=None)
    black = (claimed[0] == 0).flatten(1).all(1) & claimed[2]
    assert int(black.sum()) > 20  # foolbox reports them as successes
    result = from_foolbox(attack)(net, x, y, threat=threat)
    within = PGD(steps=100)(net, x, y, threat=threat)
    assert not (result.success & black & ~within.success).any()
    assert torch.equal(result.success, net(result.x_adv).argmax(1) != y)
    assert int(result.success.sum()) <= 1


def test_misclassified_examples_cost_one_query(trained):
    net, x, y = trained
    y = torch.where(torch.arange(len(y)) < 40, (y + 1) % 10, y)
    wrong = net(x).argmax(1) != y
    result = from_foolbox(fb.attacks.LinfPGD(steps=5))(net, x, y, threat=Linf(0.1))
    assert (result.forwards[wrong] == 1).all()
    assert (result.forwards[~wrong] == 5 + 2).all()
    assert (result.backwards[~wrong] == 5).all()


def test_each_example_has_its_own_eps(trained):
    net, x, y = trained
    eps = torch.tensor([0.02, 0.1, 0.3]).repeat(len(x) // 3 + 1)[: len(x)]
    attack = from_foolbox(fb.attacks.LinfPGD(random_start=False))
    result = attack(net, x, y, threat=Linf(eps), keep="last")
    for value in (0.02, 0.1, 0.3):
        at = (eps == value).nonzero().squeeze(1)
        assert torch.equal(result.x_adv[at], attack(net, x[at], y[at], threat=Linf(eps[at][0].item()), keep="last").x_adv)
        assert (result.size[at] > 0.9 * value).all()


def test_gradients_use_the_view_and_success_the_deployed_function(trained):
    net, x, y = trained

    def deployed(z):
        return net((z * 8).round() / 8)

    without_view, with_view = Target(deployed, module=net), Target(deployed, module=net, views={"bpda": net})
    results = [from_foolbox(fb.attacks.LinfPGD())(t, x, y, threat=Linf(0.2), keep="last") for t in (without_view, with_view)]
    assert int(results[1].success.sum()) > int(results[0].success.sum()) + 30
    assert torch.equal(results[1].success, deployed(results[1].x_adv).argmax(1) != y)


def test_a_model_without_a_graph_has_flat_gradients(trained):
    net, x, y = trained
    result = from_foolbox(fb.attacks.LinfPGD(steps=4, random_start=False))(lambda z: net(z).detach(), x, y, threat=Linf(0.1))
    correct = net(x).argmax(1) == y
    assert torch.equal(result.success, ~correct)
    assert (result.flat[correct] == 4).all()


class Broken(fb.attacks.base.FixedEpsilonAttack):
    """Returns NaN, after a query of only the first example."""

    distance = fb.distances.linf

    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        model(inputs[:1])
        return inputs * float("nan")


def test_nan_results_are_no_successes(trained):
    net, x, y = trained
    result = from_foolbox(Broken())(Target(net, batch_size=1), x[:9], y[:9], threat=Linf(0.1), keep="last")
    assert torch.equal(result.x_adv, x[:9])
    assert torch.equal(result.success, net(x[:9]).argmax(1) != y[:9])


def test_queries_of_some_examples_need_batch_size_one(trained):
    net, x, y = trained
    with pytest.raises(ShapeError, match="batch_size=1"):
        from_foolbox(Broken())(net, x[:9], y[:9], threat=Linf(0.1))


def test_early_stop_of_minimum_norm_attacks_is_optional(trained):
    net, x, y = trained
    seen = []

    class Spy(fb.attacks.base.MinimizationAttack):
        distance = fb.distances.l2

        def run(self, model, inputs, criterion, *, early_stop=None, **kwargs):
            seen.append(early_stop)
            return inputs

    for early_stop in (True, False):
        from_foolbox(Spy(), early_stop=early_stop)(net, x, y, threat=L2(0.5))
    assert seen == [0.5, None]


@pytest.mark.parametrize(
    ("attack", "threat", "goal", "why"),
    [
        (fb.attacks.LinfPGD(), L2(0.5), Misclassify(), "does not match"),
        (fb.attacks.L2PGD(), Pixels(2), Misclassify(), "does not match"),
        (fb.attacks.LinfPGD(), Linf(0.1, bounds=None), Misclassify(), "bounds=None"),
        (fb.attacks.FGSM(), Linf(0.1), ClassifyAs(), "is not supported"),
    ],
)
def test_unsupported_threats_and_goals_are_refused(trained, attack, threat, goal, why):
    net, x, y = trained
    with pytest.raises(ArgumentError, match=why):
        from_foolbox(attack)(net, x, y, goal=goal, threat=threat)


def test_an_attack_class_is_refused():
    with pytest.raises(ArgumentError, match="must be an instance"):
        from_foolbox(fb.attacks.LinfPGD)


def test_the_recipe_is_readable():
    assert repr(from_foolbox(fb.attacks.LinfPGD())).startswith("FoolboxAttack(attack=LinfProjectedGradientDescentAttack(rel_")
    assert isinstance(to_foolbox(PGD(), threat=Linf(0.1)), fb.attacks.base.FixedEpsilonAttack)
    assert issubclass(Pixels, Threat)


# the import


@pytest.mark.parametrize("call", [lambda: to_foolbox(PGD(), threat=Linf(0.1)), lambda: from_foolbox(None)])
def test_missing_foolbox_raises_with_the_install_command(monkeypatch, call):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustkit\[foolbox\]'"):
        call()


@pytest.mark.slow
def test_the_import_needs_no_git_does_not_warn_and_restores_the_environment(tmp_path):
    code = """
import os, sys
from robustkit import PGD, Linf
from robustkit.interop.foolbox import to_foolbox
assert "foolbox" not in sys.modules
before = dict(os.environ)
to_foolbox(PGD(), threat=Linf(0.1))
assert "foolbox" in sys.modules and dict(os.environ) == before
"""
    environment = {**os.environ, "PATH": str(tmp_path)}
    environment.pop("GIT_PYTHON_REFRESH", None)
    subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=True)
