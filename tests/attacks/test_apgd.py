from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from robustkit import L1, L2, ClassifyAs, Linf, Misclassify, Target
from robustkit._engine.noise import Noise
from robustkit.attack import Attack
from robustkit.attacks import APGD
from robustkit.attacks._apgd import Walk
from robustkit.errors import ArgumentError
from robustkit.goals import Goal

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
X = torch.rand(6, 1, 8, 8, dtype=torch.float64)
Y = NET(X).argmax(1)


@dataclass
class Seen:
    """A model that remembers every input it was asked about, in order."""

    net: nn.Module

    def __post_init__(self):
        self.inputs = []

    def __call__(self, x):
        self.inputs.append(x.detach().clone())
        return self.net(x)


def start(threat, x, number=0, seed=0):
    return threat.sample(x, Noise(seed, torch.arange(len(x))).at("start", number))


def by_hand(x, y, x_0, norm, eps, steps, checkpoints, rho=0.75):
    """Algorithm 1 of the paper for one image, growing f, with nothing of the package in it. Iterates, and who halved when."""

    def f(point):
        point = point.detach().requires_grad_()
        value = nn.functional.cross_entropy(NET(point[None]), y[None])
        return value.item(), torch.autograd.grad(value, point)[0]

    def project(point):
        delta = point - x
        delta = delta.clamp(-eps, eps) if norm is Linf else delta * min(1.0, eps / float(delta.norm()))
        return (x + delta).clamp(0, 1)

    eta, points, halvings = 2 * eps, [x_0], []
    (value, grad), previous, point = f(x_0), x_0, x_0
    best, x_best, grad_best, rises, marks = value, x_0, grad, 0, [0, *checkpoints]
    then, halved = value, False
    for k in range(steps):
        z = project(point + eta * (grad.sign() if norm is Linf else grad / grad.norm()))
        new = z if k == 0 else project(point + 0.75 * (z - point) + 0.25 * (point - previous))
        previous, point, value_before = point, new, value
        points.append(new)
        value, grad = f(new)
        rises += value > value_before
        if value > best:
            best, x_best, grad_best = value, new, grad
        if k + 1 in marks:
            window = k + 1 - marks[marks.index(k + 1) - 1]
            one, two = rises < rho * window, not halved and best == then
            halvings.append((one, two))
            halved, then, rises = one or two, best, 0
            if halved:
                eta, point, value, grad = eta / 2, x_best, best, grad_best
    return points, x_best, halvings


@pytest.mark.parametrize("threat", [Linf(0.4), L2(3.0), Linf(0.02)])
def test_apgd_is_algorithm_1(threat):
    """Iterate by iterate. The budgets are large, so that the loss does not just rise: lengths are halved, and once not."""
    target, checkpoints = Seen(NET), [5, 9, 12, 14, 16, 18, 19, 20]  # of 20 steps, written out by hand
    result = APGD(steps=20)(Target(target), X, Y, threat=threat, keep="last")
    told = []
    for i in range(len(X)):
        x_0 = start(threat, X)[i]
        points, x_best, halvings = by_hand(X[i], Y[i], x_0, type(threat), threat.eps, 20, checkpoints)
        ours = torch.stack([inputs[i] for inputs in target.inputs[:21]])
        assert torch.allclose(ours, torch.stack(points), rtol=0, atol=1e-9)
        assert torch.allclose(result.x_adv[i], x_best, rtol=0, atol=1e-9)
        told += halvings
    assert any(one for one, _ in told)
    assert not all(one or two for one, two in told)


@dataclass(frozen=True)
class _Told(Goal):
    """A loss that says what it is told to, with some gradient."""

    values: object

    def loss(self, out, ref):
        return out.sum(1) * 0.01 * 0 + next(self.values, 9.0) + (out.sum(1) - out.sum(1).detach())

    def success(self, out, ref):
        return torch.zeros(len(out), dtype=torch.bool)


def test_condition_2_halves_where_nothing_came_of_many_falls():
    """Most steps lower the loss, so condition 1 is silent; from the second window on the best is that of the first."""
    values = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # the start, and the five steps up to the first checkpoint
    values += [8.0, 7.0, 6.0, 5.0]  # up to the second: nothing came of it
    values += [4.0, 3.0, 2.0]  # up to the third: nothing again, but the length is new; from the best, 1, the first rises
    values += [8.0, 7.0]  # up to the fourth: nothing, and at a length that is not new
    x = torch.full((1, 3), 0.5)
    lengths = moves(
        APGD(steps=20, rho=0.5), lambda x: x, x, torch.zeros(1), goal=_Told(iter(values + [9.0] * 6)), threat=Linf(0.25)
    )
    assert lengths[:, 0].tolist()[:14] == [0.5] * 9 + [0.25] * 5
    assert lengths[14, 0] == 0.125


def moves(attack, *problem, **how):
    """The length of each move that the attack asks for, (moves, N)."""
    seen, move = [], Linf.move

    def watched(self, grad, x_adv, x, length):
        seen.append(length)
        return move(self, grad, x_adv, x, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linf, "move", watched)
        attack(*problem, **how, keep="last")
    return torch.stack(seen)


def test_the_length_never_grows_and_is_only_halved():
    eps = torch.linspace(0.1, 0.5, 6, dtype=torch.float64)
    lengths = moves(APGD(steps=40), NET, X, Y, threat=Linf(eps))
    assert torch.allclose(lengths[0], 2 * eps)
    ratios = lengths[1:] / lengths[:-1]
    assert ((ratios == 1) | (ratios == 0.5)).all()
    assert (lengths[-1] < lengths[0]).all()
    assert len({tuple(row) for row in ratios.T.tolist()}) > 1, "each example has its own"


def test_checkpoints_of_the_paper():
    """Section 3.1: p = 0, 0.22, then 0.03 less each time down to 0.06; w = ceil(100 p)."""
    assert APGD().checkpoints == (22, 41, 57, 70, 80, 87, 93, 99)


def test_checkpoints_of_few_steps_rise_within_them():
    for steps in range(1, 60):
        marks = APGD(steps=steps).checkpoints
        assert all(a < b for a, b in pairwise((0, *marks)))
        assert marks[-1] <= steps


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr"])
def test_the_best_of_all_points_comes_back(loss):
    """By the loss that was followed, over all restarts."""
    followed = Misclassify().with_surrogate({"margin": _margin, "dlr": _dlr}.get(loss, _cross_entropy))
    target = Seen(NET)
    result = APGD(steps=9, loss=loss, restarts=3)(Target(target), X, Y, threat=L2(2.0), keep="last")
    asked = target.inputs[1:31] if loss == "dlr" else target.inputs[:30]  # dlr asks about x itself before
    losses = torch.stack([followed.loss(NET(x), Y) for x in asked])
    assert torch.allclose(followed.loss(NET(result.x_adv), Y), losses.amin(0), rtol=0, atol=1e-12)
    for number in range(3):
        assert torch.equal(asked[10 * number], start(L2(2.0), X, number))


def _margin(out, ref):
    rows = torch.arange(len(out))
    others = [out[i][[c for c in range(out.shape[1]) if c != ref[i]]].max() for i in rows]
    return torch.stack(others) - out[rows, ref]


def _dlr(out, ref):
    top = out.sort(1, descending=True).values
    return _margin(out, ref) / (top[:, 0] - top[:, 2])


def _cross_entropy(out, ref):
    return -out.log_softmax(1)[torch.arange(len(out)), ref]


def test_costs():
    """A forward and a gradient for the start and each step; clean and verdict besides, and for dlr a look at x."""
    for loss, looks in (("cross-entropy", 0), ("dlr", 1), ("targeted-dlr", 1)):
        result = APGD(steps=7, loss=loss, restarts=2, targets=1)(NET, X, Y, threat=Linf(1e-9))
        assert (result.backwards == 2 * 8).all()
        assert (result.forwards == 1 + looks + 2 * 8 + 1).all()


@dataclass(frozen=True)
class _BackAfterSuccess(Attack):
    """Goes over the border and back; tells what the walk made of it."""

    told: list

    def run(self, problem):
        walk = Walk(problem, problem.x)
        there = 1 - problem.x
        walk.to(there)
        self.told.append((walk.best.x_adv.clone(), walk.best.loss.clone()))
        walk.to(problem.x)
        self.told.append((walk.best.x_adv, walk.best.loss))
        return walk.best.x_adv


@pytest.mark.parametrize("keep", ["first", "best"])
def test_the_zero_of_solved_examples_is_not_taken_for_their_loss(keep):
    """The cross-entropy of a wanted class is above zero, which would be the best of all."""
    net = nn.Linear(2, 2, bias=False)
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    x, told = torch.tensor([[0.8, 0.2]]), []
    attack = _BackAfterSuccess(told)
    assert attack(net, x, torch.tensor([1]), goal=ClassifyAs(), threat=Linf(0.9), keep=keep).success.all()
    (first, loss), (later, loss_later) = told
    assert torch.equal(first, 1 - x)
    assert torch.equal(later, first)
    assert torch.equal(loss_later, loss)
    assert float(loss) == pytest.approx(0.4375, abs=1e-4)  # log(1 + exp(-0.6))


@pytest.mark.parametrize("threat", [Linf(0.2, bounds=None), L2(0.5, bounds=None), Linf(0.3)])
def test_on_a_linear_model_the_optimum_is_reached(threat):
    """Of the margin between two classes: budget times dual norm; inside a box coordinate by coordinate."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    y = net(X).argmax(1)
    way = (net[1].weight[1] - net[1].weight[0]).detach() * (1 - 2.0 * y.double()).unsqueeze(1)
    result = APGD(steps=30, loss="margin")(net, X, y, threat=threat, keep="last")
    gain = (way * (result.x_adv - X).flatten(1)).sum(1)
    if threat.bounds is None:
        best = threat.eps * way.norm(1 if isinstance(threat, Linf) else 2, dim=1)
    else:
        best = (way.abs() * torch.where(way > 0, 1 - X.flatten(1), X.flatten(1)).clamp(max=threat.eps)).sum(1)
    assert torch.allclose(gain, best, rtol=1e-6, atol=0)


class _Bait(nn.Module):
    """Class 1 is nearest and out of reach; class 2 is far behind, and reached at the far end of the second input alone."""

    def forward(self, x):
        zero = torch.zeros_like(x[:, 0])
        return torch.stack([zero, 0.05 * x[:, 0].tanh() - 0.1, 10.2 * x[:, 1] - 10, zero - 20], 1)


def test_a_class_that_only_runs_towards_it_reach():
    net, x, y = _Bait(), torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)
    run = lambda **fields: APGD(steps=25, **fields)(net, x, y, threat=Linf(1.0, bounds=None))  # noqa: E731
    assert not run(loss="margin", restarts=3).success.any()
    assert not run(loss="dlr", restarts=3).success.any()
    assert not run(loss="targeted-dlr", targets=1).success.any()
    both = run(loss="targeted-dlr", targets=2)
    assert both.success.all()
    assert (net(both.x_adv).argmax(1) == 2).all()
    assert both.notes == ()


def test_a_wanted_class_has_one_part():
    net, x, wanted = _Bait(), torch.zeros(8, 2), torch.full((8,), 2)
    for loss in ("dlr", "targeted-dlr"):
        result = APGD(steps=25, loss=loss)(net, x, wanted, goal=ClassifyAs(), threat=Linf(1.0, bounds=None))
        assert result.success.all()


@pytest.mark.parametrize(
    ("classes", "loss", "goal", "told"),
    [
        (2, "dlr", Misclassify(), "dlr needs more than the model's 2 classes: the margin was followed"),
        (2, "targeted-dlr", Misclassify(), "targeted-dlr needs more than the model's 2 classes: the margin was followed"),
        (3, "dlr", Misclassify(), None),
        (3, "targeted-dlr", Misclassify(), "targeted-dlr towards one class needs more than the model's 3"),
        (3, "dlr", ClassifyAs(), "dlr towards one class needs more than the model's 3"),
        (4, "targeted-dlr", Misclassify(), None),
        (2, "cross-entropy", Misclassify(), None),
    ],
)
def test_with_few_classes_it_says_which_loss_ran_and_works(classes, loss, goal, told):
    """Linear classes: where one of the others can be reached, it is."""
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
    y = net(X).argmax(1)
    weight, scores = net[1].weight, net(X)
    reach = (scores.gather(1, y[:, None]) - scores) / (weight[None] - weight[y][:, None]).norm(1, dim=2)
    needed = reach.nan_to_num(torch.inf).scatter(1, y[:, None], torch.inf).amin(1)
    ref, eps = (y if goal == Misclassify() else (y + 1) % classes), 1.1 * needed.max().item()
    result = APGD(steps=15, loss=loss)(net, X, ref, goal=goal, threat=Linf(eps, bounds=None))
    assert goal == ClassifyAs() or result.success.all()
    notes = [note.why for note in result.notes if note.name == "loss"]
    assert len(notes) == (told is not None)
    assert told is None or notes[0].startswith(told)


@dataclass(frozen=True)
class _Small(Goal):
    """The first output below zero: a goal that knows one loss."""

    def loss(self, out, ref):
        return out[:, 0]

    def success(self, out, ref):
        return out[:, 0] < 0


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr", "targeted-dlr"])
def test_a_goal_with_one_loss_keeps_to_it_and_a_note_says_so(loss):
    x = torch.full((4, 3), 0.5)
    result = APGD(steps=5, loss=loss)(lambda x: x - 0.3, x, torch.zeros(4), goal=_Small(), threat=Linf(0.25))
    assert result.success.all()
    assert [note.why for note in result.notes] == [f"_Small() has a loss of its own, which was followed, not {loss}"]


def test_restarts_try_new_starts():
    """No gradient, and a success for those only whose start lies far enough: one of the starts of the example does or not."""
    net = lambda x: torch.stack([0.5 * torch.ones(len(x)), (x[:, 0] > 0.95).float()], 1)  # noqa: E731
    x, threat = torch.full((40, 1), 0.5), Linf(0.5)
    draws = torch.stack([start(threat, x, number)[:, 0] > 0.95 for number in range(6)])
    result = APGD(steps=1, restarts=6)(net, x, torch.zeros(40, dtype=torch.int64), threat=threat)
    assert torch.equal(result.success, draws.any(0))
    assert 0 < int(draws[0].sum()) < int(draws.any(0).sum()) < 40


def test_a_loss_that_is_no_number_is_never_the_best():
    values = iter([float("nan"), 3.0, 2.0, float("nan"), float("nan")])
    x = torch.full((1, 3), 0.5)
    target = Seen(nn.Identity())
    result = APGD(steps=4)(Target(target), x, torch.zeros(1), goal=_Told(values), threat=Linf(0.25), keep="last")
    assert torch.equal(result.x_adv, target.inputs[2])


def test_bad_values_are_refused():
    for fields in ({"steps": 0}, {"restarts": 0}, {"targets": 0}, {"rho": 0}, {"rho": 1.5}, {"momentum": 1.5}, {"loss": "ce"}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            APGD(**fields)
    with pytest.raises(ArgumentError, match="it serves Linf, L2; for L1 there is L1APGD"):
        APGD()(NET, X, Y, threat=L1(1.0))
