"""`Standard` on models whose robustness is known, the cost of its stages, its budget and its fields."""

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

WITHOUT_AUDIT = Standard(audit=False)
torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))
X = torch.rand(12, 1, 8, 8)
Y = NET(X).argmax(1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Linear models, in closed form.


def linear(classes, dtype=torch.float32):
    """A linear classifier with all scores equal in the middle of the box, its weights, and points near the middle."""
    weight, x = normal(classes, 10, dtype=dtype), 0.5 + 0.1 * normal(40, 10, seed=1, dtype=dtype)

    def model(x):
        return (x - 0.5) @ weight.T

    return model, weight, x.clamp(0.3, 0.7)


def distance(weight, x, dual):
    """The distance of each point to the nearest decision boundary, (N,), in the norm with the given dual."""
    scores = ((x - 0.5) @ weight.T).double()
    y = scores.argmax(1)
    gaps = scores.gather(1, y[:, None]) - scores
    lengths = torch.stack([(weight - weight[k]).double().norm(dual, 1) for k in y.tolist()])
    return (gaps / lengths).scatter(1, y[:, None], torch.inf).amin(1)


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.float32), (3, torch.float64), (8, torch.float32)])
@pytest.mark.parametrize(("norm", "dual"), [(Linf, 1), (L2, 2)])
def test_on_a_linear_model_success_is_that_of_the_closed_form(classes, norm, dual, dtype):
    model, weight, x = linear(classes, dtype)
    to_boundary = distance(weight, x, dual)
    eps = float(to_boundary.median())  # half of the points can be solved; the box is far away
    clear = (to_boundary / eps - 1).abs() > 1e-3
    assert clear.sum() >= 37
    result = WITHOUT_AUDIT(model, x, model(x).argmax(1), threat=norm(eps))
    assert torch.equal(result.success[clear], (to_boundary < eps)[clear])
    assert result.x_adv.dtype == dtype
    assert norm(eps).contains(result.x_adv, x).all()


@pytest.mark.parametrize("norm", [Linf, L2])
def test_a_single_example(norm):
    model, weight, x = linear(4)
    to_boundary = distance(weight, x, {Linf: 1, L2: 2}[norm])
    for factor in (0.97, 1.03):
        result = WITHOUT_AUDIT(model, x[:1], model(x)[:1].argmax(1), threat=norm(factor * float(to_boundary[0])))
        assert bool(result.success) is (factor > 1)


def test_a_target_class_is_reached_where_the_closed_form_says():
    """The model reads one coordinate: class 2 wins above 0.6, class 1 below 0.4."""

    def model(x):
        u = x[:, 0]
        return torch.stack([torch.full_like(u, 0.2), 5 * (0.44 - u), 2 * (u - 0.5)], 1)

    x = torch.tensor([[0.45, 0.5], [0.52, 0.1], [0.55, 0.9]])
    for target_class, reached in ((2, [False, True, True]), (1, [True, False, False])):
        result = WITHOUT_AUDIT(model, x, torch.full((3,), target_class), goal=ClassifyAs(), threat=Linf(0.1))
        assert result.success.tolist() == reached


# Descents towards the parts of the goal.


def decoy(x):
    """A function of the mean perturbation t in budgets.

    Class 1 is ahead of class 2 at x and gains for t < 0, but never wins; class 2 wins for t > 5 / 6.
    """
    t = (x - 0.5).flatten(1).mean(1) / 0.1
    return torch.stack([torch.zeros_like(t), -0.5 - 0.2 * t, -1 + 1.2 * t], 1)


def test_a_class_that_only_targeted_attacks_reach():
    x, y = torch.full((6, 1, 8, 8), 0.5), torch.zeros(6, dtype=torch.int64)
    without = Standard(skip="parts", audit=False)(decoy, x, y, threat=Linf(0.1))
    assert [without.stages[number].name for number in without.solver.tolist()] == ["boundary"] * 6  # walks are targeted too
    result = WITHOUT_AUDIT(decoy, x, y, threat=Linf(0.1))
    assert result.success.all()
    assert [result.stages[number].name for number in result.solver.tolist()] == ["parts"] * 6
    assert not Standard(parts=1, audit=False)(
        decoy, x, y, threat=Linf(0.08)
    ).success.any()  # class 2 cannot win within this budget


# Boundary walks.


@pytest.mark.slow
def test_longer_walks_are_run_where_descents_miss_many_examples():
    """A network with thresholds in L2; 3 of these 40 examples are robust by pyautoattack 0.2.0 (standard, seed 0)."""
    part, net = data.load("mnist-5k").part(limit=40), zoo.load("mnist-cnn-robust")
    without_walks = Standard(skip="boundary", audit=False)(net, part.x, part.y, threat=L2(2.0))
    with_walks = Standard(audit=False)(net, part.x, part.y, threat=L2(2.0))
    assert (~without_walks.success).sum() >= 15
    assert (~with_walks.success).sum() <= 3
    assert [note.name for note in with_walks.notes] == ["boundary-breaks"]
    assert not [note for note in without_walks.notes if note.name == "boundary-breaks"]
    stages = {stage.name: stage for stage in with_walks.stages}
    assert stages["boundary"].solved > stages["parts"].solved


def test_only_one_short_walk_is_run_where_descents_miss_nothing():
    model, weight, x = linear(8)
    threat = Linf(0.9 * float(distance(weight, x, 1).min()))
    result = WITHOUT_AUDIT(model, x, model(x).argmax(1), threat=threat)
    (walks,) = [stage for stage in result.stages if stage.name == "boundary"]
    assert walks.backwards == 20 * 40
    assert not [note for note in result.notes if note.name == "boundary-breaks"]


# Costs and budgets.


def cost(result):
    return result.forwards + 2 * result.backwards


EPS = 0.05  # some examples are solved, and some of the others come close enough for every stage


@pytest.fixture(scope="module")
def full():
    return WITHOUT_AUDIT(NET, X, Y, threat=Linf(EPS))


@pytest.fixture(scope="module")
def unsolved(full):
    """The examples that a full run leaves unsolved."""
    return X[~full.success], Y[~full.success]


@pytest.mark.parametrize("budget", [1, 20, 70, 150, 300, 1000])
def test_the_stages_of_the_cascade_respect_the_budget(budget, unsolved, full):
    """The final evaluation costs one forward more."""
    result = Standard(audit=False, budget=budget)(NET, *unsolved, threat=Linf(EPS))
    assert (cost(result) <= budget + 1).all()
    reasons = [note.why for note in result.notes if note.name == "budget"]
    assert bool(reasons) is bool((cost(full)[~full.success] > budget + 1).any())
    assert all(why.startswith(f"budget={budget} is too small for ") for why in reasons)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("budget", [1, 100, 700, 900])
def test_the_audit_respects_the_budget_and_a_skipped_escalation_is_noted(budget, count):
    """A model with a flipped gradient: with a budget there is no escalation, which is noted where a flag calls for it.

    The cascade costs 203 (see below), and the estimated cost of the audit is 500.
    """
    model, _, x = linear(10)
    x, y = x[:count], model(x[:count]).argmax(1)

    def flipped(z):
        out = model(z)
        return 2 * out.detach() - out

    result = Standard(budget=budget)(flipped, x, y, threat=Linf(1e-4))
    assert (cost(result) <= budget + 1).all()
    stages = {stage.name: stage.forwards for stage in result.stages}
    assert bool(stages["audit"]) is (budget >= 703)
    assert "escalation" not in stages
    flagged = "gradients-disagree" in {flag.name for flag in result.flags}
    assert flagged is (budget >= 703 and count == 40)
    reasons = {note.why for note in result.notes if note.name == "budget"}
    left = int((~result.success).sum())
    assert (f"budget={budget} is too small for escalation on {left} examples" in reasons) is flagged
    assert (f"budget={budget} is too small for audit on {count} examples" in reasons) is (budget < 703)


@pytest.mark.parametrize("goal", [ClassifyAs(), Misclassify()])
def test_a_goal_with_a_single_part_gets_two_descents(goal):
    """Two classes, or one target class: there is no second part."""
    model, weight, x = linear(2)
    y = model(x).argmax(1)
    threat = Linf(0.5 * float(distance(weight, x, 1).min()))
    result = WITHOUT_AUDIT(model, x, 1 - y if goal == ClassifyAs() else y, goal=goal, threat=threat)
    assert next(stage.backwards for stage in result.stages if stage.name == "parts") == 2 * 20 * 40
    one = Standard(parts=1, audit=False)(model, x, y, threat=threat)
    assert next(stage.backwards for stage in one.stages if stage.name == "parts") == 20 * 40


def test_a_note_names_each_skipped_stage_and_the_number_of_examples():
    """With ten classes: the clean forward costs 1, the first pass 19, two parts 122, a walk 61."""
    model, weight, x = linear(10)
    y, threat = model(x).argmax(1), Linf(0.4 * float(distance(weight, x, 1).min()))

    def skipped(budget):
        result = Standard(audit=False, budget=budget)(model, x, y, threat=threat)
        return {note.why for note in result.notes if note.name == "budget"}

    reason = "budget={} is too small for {} on 40 examples".format
    assert skipped(1 + 18) == {reason(19, "first-pass")}  # without the first pass there are no parts and no walks
    assert skipped(1 + 19 + 60) == {reason(80, "parts"), reason(80, "boundary")}
    assert skipped(1 + 19 + 121) == {reason(141, "parts")}
    assert skipped(1 + 19 + 122 + 60) == {reason(202, "boundary")}
    assert skipped(1 + 19 + 122 + 61) == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_stage_costs_nothing_and_the_others_are_run(stage, unsolved, full):
    """The last parts, "refine" and the restarts share a stage."""
    result = Standard(audit=False, skip=stage)(NET, *unsolved, threat=Linf(EPS))

    def spent(result):
        sums = dict.fromkeys(STAGES, 0)
        for stage in result.stages:
            if stage.name in sums:
                sums[stage.name] += stage.forwards + stage.backwards
        return sums

    whole, part = spent(full), spent(result)
    del whole["refine"], part["refine"]
    if stage in ("refine", "restarts"):
        assert part["restarts"] < whole["restarts"]
    else:
        assert part.pop(stage) == 0
    assert all(part.values())


@pytest.mark.parametrize("audit", [False, True])
def test_costs_and_successes_of_the_stages_add_up(audit):
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


def test_steps_and_parts_are_those_of_the_fields(unsolved):
    x, y = unsolved
    n = len(x)
    result = Standard(steps=7, parts=3, audit=False)(NET, x, y, threat=Linf(EPS))
    stages = [(stage.name, stage.backwards) for stage in result.stages[:4]]
    assert stages[1:] == [("first-pass", 4 * n), ("patches", 0), ("parts", 3 * 7 * n)]


# Other goals and models.


@dataclass(frozen=True)
class Exceed(Goal):
    """The output above the reference, (N,); it has one part, and no surrogate losses."""

    def loss(self, out, ref):
        return ref - out[:, 0]

    def success(self, out, ref):
        return out[:, 0] > ref


@pytest.mark.parametrize("audit", [False, True])
def test_a_custom_goal_that_defines_only_a_loss_and_success(audit):
    """The output is x . w, which grows by at most eps * |w|_1."""
    weight = normal(10)
    x, reach = 0.3 + 0.4 * torch.rand(8, 10, generator=torch.Generator().manual_seed(2)), 0.1 * float(weight.abs().sum())
    share = torch.tensor([0.2, 0.7, 0.99, 1.01, 1.5, 0.5, 3.0, 0.9])
    out = lambda x: (x * weight).sum(1, keepdim=True)  # noqa: E731
    result = Standard(audit=audit)(out, x, out(x)[:, 0] + share * reach, goal=Exceed(), threat=Linf(0.1))
    assert torch.equal(result.success, share < 1)
    assert [flag.name for flag in result.flags] == []


def test_a_model_that_fails_on_a_batch_of_one_gets_two_copies():
    """Batch norm in training mode maps two equal rows to zero, so the output is the bias."""
    weight, layer, bias = normal(10, 6), normal(6, 3, seed=1), torch.tensor([0.3, 0.1, 0.2])

    def model(x):
        return functional.batch_norm(x @ weight, None, None, training=True) @ layer + bias

    x = torch.rand(1, 10, generator=torch.Generator().manual_seed(0))
    result = Standard()(model, x, torch.tensor([0]), threat=Linf(0.1))
    assert not result.success.any()
    (note,) = [note for note in result.notes if note.name == "fails-alone"]
    assert "more than 1 value per channel" in note.why


def test_misclassified_examples_cost_one_forward():
    wrong = (Y + 1) % 5
    result = Standard()(NET, X, wrong, threat=Linf(0.02))
    assert result.success.all()
    assert (result.forwards == 1).all()
    assert (result.backwards == 0).all()
    assert torch.equal(result.x_adv, X)


def test_the_surrogate_of_the_goal_does_not_matter():
    """The cascade uses its own losses, and the success of the goal."""
    default = WITHOUT_AUDIT(NET, X, Y, threat=Linf(0.02))
    flat = WITHOUT_AUDIT(NET, X, Y, goal=Misclassify(lambda out, ref: out[:, 0] * 0), threat=Linf(0.02))
    assert torch.equal(default.x_adv, flat.x_adv)


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"parts": 0}, {"parts": 1.5}, {"budget": 0}, {"budget": 10.5}, {"skip": "audit"}]
)
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        Standard(**fields)
