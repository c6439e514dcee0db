from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from robustkit import L2, Linf, Misclassify, data, zoo
from robustkit.attacks import Standard
from robustkit.attacks.standard.standard import STAGES
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Goal

BARE = Standard(audit=False)
torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))
X = torch.rand(12, 1, 8, 8)
Y = NET(X).argmax(1)


def dice(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# What can fall, falls.


def linear(classes, dtype=torch.float32):
    """Classes by hyperplanes through the middle of the box, and points around it."""
    weight, x = dice(classes, 10, dtype=dtype), 0.5 + 0.1 * dice(40, 10, seed=1, dtype=dtype)

    def model(x):
        return (x - 0.5) @ weight.T

    return model, weight, x.clamp(0.3, 0.7)


def distance(weight, x, dual):
    """To the nearest of the hyperplanes between the class of each point and another, in the norm whose dual is given."""
    scores = ((x - 0.5) @ weight.T).double()
    y = scores.argmax(1)
    gaps = scores.gather(1, y[:, None]) - scores
    lengths = torch.stack([(weight - weight[k]).double().norm(dual, 1) for k in y.tolist()])
    return (gaps / lengths).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.float32), (3, torch.float64), (8, torch.float32)])
@pytest.mark.parametrize(("norm", "dual"), [(Linf, 1), (L2, 2)])
def test_on_linear_classes_exactly_those_fall_that_can(classes, norm, dual, dtype):
    model, weight, x = linear(classes, dtype)
    far = distance(weight, x, dual)
    eps = float(far.median())  # far from the box, so that half of them can
    clear = (far / eps - 1).abs() > 1e-3
    assert clear.sum() >= 37
    result = BARE(model, x, model(x).argmax(1), threat=norm(eps))
    assert torch.equal(result.success[clear], (far < eps)[clear])
    assert result.x_adv.dtype == dtype
    assert norm(eps).contains(result.x_adv, x).all()


@pytest.mark.parametrize("norm", [Linf, L2])
def test_one_example_alone(norm):
    model, weight, x = linear(4)
    far = distance(weight, x, {Linf: 1, L2: 2}[norm])
    for factor in (0.97, 1.03):
        result = BARE(model, x[:1], model(x)[:1].argmax(1), threat=norm(factor * float(far[0])))
        assert bool(result.success) is (factor > 1)


def test_a_wanted_class_is_reached_where_it_can_be():
    """In Linf, whether the wanted class can come first at all is a small linear programme; with three classes and one
    coordinate it is read off: class 2 wins from 0.6 on, class 1 below 0.4."""

    def model(x):
        u = x[:, 0]
        return torch.stack([torch.full_like(u, 0.2), 5 * (0.44 - u), 2 * (u - 0.5)], 1)

    x = torch.tensor([[0.45, 0.5], [0.52, 0.1], [0.55, 0.9]])
    for wanted, reached in ((2, [False, True, True]), (1, [True, False, False])):
        result = BARE(model, x, torch.full((3,), wanted), goal=ClassifyAs(), threat=Linf(0.1))
        assert result.success.tolist() == reached


# What the parts are for.


def decoy(x):
    """Of the mean change t: class 1 is ahead of class 2 at x and comes nearer for t < 0, but never first; class 2 wins from
    t = 5 / 6 of the budget on."""
    t = (x - 0.5).flatten(1).mean(1) / 0.1
    return torch.stack([torch.zeros_like(t), -0.5 - 0.2 * t, -1 + 1.2 * t], 1)


def test_a_class_that_only_targeting_reaches():
    x, y = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    without = Standard(skip="parts", audit=False)(decoy, x, y, threat=Linf(0.1))
    assert [without.stages[number].name for number in without.solver.tolist()] == ["boundary"] * 6  # which has an aim too
    result = BARE(decoy, x, y, threat=Linf(0.1))
    assert result.success.all()
    assert [result.stages[number].name for number in result.solver.tolist()] == ["parts"] * 6
    assert not Standard(parts=1, audit=False)(decoy, x, y, threat=Linf(0.08)).success.any()  # out of its reach


# What walks along the border are for.


def test_where_descents_miss_much_longer_walks_are_made():
    """A net with thresholds in L2; by pyautoattack 0.2.0 (standard, seed 0) 3 of these 40 are robust."""
    part, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn-robust")
    blind = Standard(skip="boundary", audit=False)(net, part.x, part.y, threat=L2(2.0))
    seeing = Standard(audit=False)(net, part.x, part.y, threat=L2(2.0))
    assert (~blind.success).sum() >= 15
    assert (~seeing.success).sum() <= 3
    assert [note.name for note in seeing.notes] == ["boundary-breaks"]
    assert not [note for note in blind.notes if note.name == "boundary-breaks"]
    stages = {stage.name: stage for stage in seeing.stages}
    assert stages["boundary"].solved > stages["parts"].solved


def test_where_descents_miss_nothing_one_short_walk_is_all():
    model, weight, x = linear(8)
    threat = Linf(0.9 * float(distance(weight, x, 1).min()))
    result = BARE(model, x, model(x).argmax(1), threat=threat)
    (border,) = [stage for stage in result.stages if stage.name == "boundary"]
    assert border.backwards == 20 * 40
    assert not [note for note in result.notes if note.name == "boundary-breaks"]


# What it costs, and who pays.


def cost(result):
    return result.forwards + 2 * result.backwards


EPS = 0.05  # some fall, and some of those that do not come near enough for every stage


@pytest.fixture(scope="module")
def full():
    return BARE(NET, X, Y, threat=Linf(EPS))


@pytest.fixture(scope="module")
def stubborn(full):
    """The examples that a full run leaves."""
    return X[~full.success], Y[~full.success]


@pytest.mark.parametrize("budget", [1, 20, 70, 150, 300, 1000])
def test_the_stages_of_the_cascade_respect_the_budget(budget, stubborn, full):
    """Beyond it there is the verdict, one forward."""
    result = Standard(audit=False, budget=budget)(NET, *stubborn, threat=Linf(EPS))
    assert (cost(result) <= budget + 1).all()
    told = [note.why for note in result.notes if note.name == "budget"]
    assert bool(told) is bool((cost(full)[~full.success] > budget + 1).any())
    assert all(why.startswith(f"{budget} was too little for ") for why in told)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("budget", [1, 100, 700, 900])
def test_the_audit_respects_the_budget_too_and_what_it_calls_for_is_told(budget, count):
    """A model whose gradient is turned round: with a budget there is no escalation, and a note says so.

    The cascade costs 203 (see below), and the audit is reckoned with 500.
    """
    model, _, x = linear(10)
    x, y = x[:count], model(x[:count]).argmax(1)

    def turned(z):
        out = model(z)
        return 2 * out.detach() - out

    result = Standard(budget=budget)(turned, x, y, threat=Linf(1e-4))
    assert (cost(result) <= budget + 1).all()
    stages = {stage.name: stage.forwards for stage in result.stages}
    assert bool(stages["audit"]) is (budget >= 703)
    assert "escalation" not in stages
    flagged = "gradients-disagree" in {flag.name for flag in result.flags}
    assert flagged is (budget >= 703 and count == 40)
    told = {note.why for note in result.notes if note.name == "budget"}
    assert (f"{budget} was too little for escalation on {int((~result.success).sum())} examples" in told) is flagged
    assert (f"{budget} was too little for audit on {count} examples" in told) is (budget < 703)


@pytest.mark.parametrize("goal", [ClassifyAs(), Misclassify()])
def test_a_goal_that_is_its_only_part_is_descended_twice(goal):
    """Two classes, or one wanted class: there is no second part to go for."""
    model, weight, x = linear(2)
    y = model(x).argmax(1)
    threat = Linf(0.5 * float(distance(weight, x, 1).min()))
    result = BARE(model, x, 1 - y if goal == ClassifyAs() else y, goal=goal, threat=threat)
    assert next(stage.backwards for stage in result.stages if stage.name == "parts") == 2 * 20 * 40
    one = Standard(parts=1, audit=False)(model, x, y, threat=threat)
    assert next(stage.backwards for stage in one.stages if stage.name == "parts") == 20 * 40


def test_a_note_says_what_was_skipped_and_for_how_many():
    """Of ten classes by hyperplanes far away: the clean forward costs one, the look 19, two parts 122, a walk 61."""
    model, weight, x = linear(10)
    y, threat = model(x).argmax(1), Linf(0.4 * float(distance(weight, x, 1).min()))

    def skipped(budget):
        result = Standard(audit=False, budget=budget)(model, x, y, threat=threat)
        return {note.why for note in result.notes if note.name == "budget"}

    told = "{} was too little for {} on 40 examples".format
    assert skipped(1 + 18) == {told(19, "first-pass")}  # who was not looked at has no parts, and does not walk
    assert skipped(1 + 19 + 60) == {told(80, "parts"), told(80, "boundary")}
    assert skipped(1 + 19 + 121) == {told(141, "parts")}
    assert skipped(1 + 19 + 122 + 60) == {told(202, "boundary")}
    assert skipped(1 + 19 + 122 + 61) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_skipped_costs_nothing_and_all_else_is_done(stage, stubborn, full):
    """The last parts, polish and the restarts themselves share a stage."""
    result = Standard(audit=False, skip=stage)(NET, *stubborn, threat=Linf(EPS))

    def spent(result):
        sums = dict.fromkeys(STAGES, 0)
        for one in result.stages:
            if one.name in sums:
                sums[one.name] += one.forwards + one.backwards
        return sums

    whole, part = spent(full), spent(result)
    del whole["refine"], part["refine"]
    if stage in ("refine", "restarts"):
        assert part["restarts"] < whole["restarts"]
    else:
        assert part.pop(stage) == 0
    assert all(part.values())


@pytest.mark.parametrize("audit", [False, True])
def test_stages_add_up_to_what_was_paid_and_found(audit):
    result = Standard(audit=audit)(NET, X, Y, threat=Linf(EPS))
    assert 0 < result.success.sum() < 12
    names = ["clean", "first-pass", "patches", "parts", "boundary", "restarts", *(["audit"] if audit else []), "attack"]
    assert list(dict.fromkeys(stage.name for stage in result.stages)) == names
    assert all(stage.forwards >= 0 for stage in result.stages)
    assert sum(stage.forwards for stage in result.stages) == result.forwards.sum()
    assert sum(stage.backwards for stage in result.stages) == result.backwards.sum()
    assert sum(stage.solved for stage in result.stages) == result.success.sum()
    for number, stage in enumerate(result.stages):
        assert (result.solver == number).sum() == stage.solved


def test_steps_and_parts_are_those_of_the_fields(stubborn):
    x, y = stubborn
    left = len(x)
    result = Standard(steps=7, parts=3, audit=False)(NET, x, y, threat=Linf(EPS))
    stages = [(stage.name, stage.backwards) for stage in result.stages[:4]]
    assert stages[1:] == [("first-pass", 4 * left), ("patches", 0), ("parts", 3 * 7 * left)]


# Other goals and models.


@dataclass(frozen=True)
class Exceed(Goal):
    """The output above the reference, (N,); of one part, and with a loss of its own alone."""

    def loss(self, out, ref):
        return ref - out[:, 0]

    def success(self, out, ref):
        return out[:, 0] > ref


@pytest.mark.parametrize("audit", [False, True])
def test_a_goal_of_ones_own_with_nothing_but_a_loss(audit):
    """One output x . w: by at most eps * |w|_1 does it grow."""
    weight = dice(10)
    x, reach = 0.3 + 0.4 * torch.rand(8, 10, generator=torch.Generator().manual_seed(2)), 0.1 * float(weight.abs().sum())
    share = torch.tensor([0.2, 0.7, 0.99, 1.01, 1.5, 0.5, 3.0, 0.9])
    out = lambda x: (x * weight).sum(1, keepdim=True)  # noqa: E731
    result = Standard(audit=audit)(out, x, out(x)[:, 0] + share * reach, goal=Exceed(), threat=Linf(0.1))
    assert torch.equal(result.success, share < 1)
    assert [flag.name for flag in result.flags] == []


def test_a_model_that_fails_on_one_image_is_asked_about_two():
    """Batch norm in training mode; of two equal rows it makes zeros, so the answer is the bias of the readout."""
    weight, readout, bias = dice(10, 6), dice(6, 3, seed=1), torch.tensor([0.3, 0.1, 0.2])

    def model(x):
        return functional.batch_norm(x @ weight, None, None, training=True) @ readout + bias

    x = torch.rand(1, 10, generator=torch.Generator().manual_seed(0))
    result = Standard()(model, x, torch.tensor([0]), threat=Linf(0.1))
    assert not result.success.any()
    (note,) = [note for note in result.notes if note.name == "fails-alone"]
    assert "more than 1 value per channel" in note.why


def test_wrong_examples_cost_one_look():
    wrong = (Y + 1) % 5
    result = Standard()(NET, X, wrong, threat=Linf(0.02))
    assert result.success.all()
    assert (result.forwards == 1).all()
    assert (result.backwards == 0).all()
    assert torch.equal(result.x_adv, X)


def test_the_surrogate_of_the_goal_does_not_matter():
    """The cascade has its own; what is asked of the goal is success."""
    one = BARE(NET, X, Y, threat=Linf(0.02))
    other = BARE(NET, X, Y, goal=Misclassify(lambda out, ref: out[:, 0] * 0), threat=Linf(0.02))
    assert torch.equal(one.x_adv, other.x_adv)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"parts": 0}, {"parts": 1.5}, {"budget": 0}, {"budget": 10.5}, {"skip": "audit"}]
)
def test_senseless_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        Standard(**fields)
