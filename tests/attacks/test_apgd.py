from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn

from robustkit import L1, L2, ClassifyAs, Linf, Misclassify, Target
from robustkit._engine.noise import Noise
from robustkit.attack import Attack
from robustkit.attacks import APGD
from robustkit.attacks._restarted_attack import Trajectory
from robustkit.errors import ArgumentError
from robustkit.goals import Goal

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
X = torch.rand(6, 1, 8, 8, dtype=torch.float64)
Y = NET(X).argmax(1)


@dataclass
class Recorder:
    """A model that records every input, in order."""

    net: nn.Module

    def __post_init__(self):
        self.inputs = []

    def __call__(self, x):
        self.inputs.append(x.detach().clone())
        return self.net(x)


def start(threat, x, number=0, seed=0):
    return threat.sample(x, Noise(seed, torch.arange(len(x))).at("start", number))


def reference_apgd(x, y, x_0, norm, eps, steps, checkpoints, rho=0.75):
    """Algorithm 1 for one image, maximising f, independent of the package; conditions 1 and 2 at each checkpoint."""

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
        previous, point, last_value = point, new, value
        points.append(new)
        value, grad = f(new)
        rises += value > last_value
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
def test_apgd_equals_algorithm_1(threat):
    """Iterate by iterate. The budgets are large, so that some but not all checkpoints halve the step size."""
    target, checkpoints = Recorder(NET), [5, 9, 12, 14, 16, 18, 19, 20]  # of 20 steps, written out by hand
    result = APGD(steps=20)(Target(target), X, Y, threat=threat, keep="last")
    conditions = []
    for i in range(len(X)):
        x_0 = start(threat, X)[i]
        points, x_best, halvings = reference_apgd(X[i], Y[i], x_0, type(threat), threat.eps, 20, checkpoints)
        ours = torch.stack([inputs[i] for inputs in target.inputs[:21]])
        assert torch.allclose(ours, torch.stack(points), rtol=0, atol=1e-9)
        assert torch.allclose(result.x_adv[i], x_best, rtol=0, atol=1e-9)
        conditions += halvings
    assert any(one for one, _ in conditions)
    assert not all(one or two for one, two in conditions)


@dataclass(frozen=True)
class _Scripted(Goal):
    """A loss with given values and some gradient."""

    values: object

    def loss(self, out, ref):
        return out.sum(1) * 0.01 * 0 + next(self.values, 9.0) + (out.sum(1) - out.sum(1).detach())

    def success(self, out, ref):
        return torch.zeros(len(out), dtype=torch.bool)


def test_condition_2_halves_where_the_best_loss_did_not_change():
    """Most steps lower the loss, so condition 1 does not hold; from the second window on the best loss is that of the first."""
    values = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0]  # the start, and the five steps up to the first checkpoint
    values += [8.0, 7.0, 6.0, 5.0]  # up to the second: no new best loss
    values += [4.0, 3.0, 2.0]  # up to the third: none again, but the step size is new; from the best, 1, the first step rises
    values += [8.0, 7.0]  # up to the fourth: none, at a step size that is not new
    x = torch.full((1, 3), 0.5)
    step_sizes = step_sizes_of(
        APGD(steps=20, rho=0.5), lambda x: x, x, torch.zeros(1), goal=_Scripted(iter(values + [9.0] * 6)), threat=Linf(0.25)
    )
    assert step_sizes[:, 0].tolist()[:14] == [0.5] * 9 + [0.25] * 5
    assert step_sizes[14, 0] == 0.125


def step_sizes_of(attack, *problem, **options):
    """The step size of each move of the attack, (moves, N)."""
    step_sizes, move = [], Linf.move

    def recorded(self, grad, x_adv, x, length):
        step_sizes.append(length)
        return move(self, grad, x_adv, x, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linf, "move", recorded)
        attack(*problem, **options, keep="last")
    return torch.stack(step_sizes)


def test_the_step_size_is_only_ever_halved():
    eps = torch.linspace(0.1, 0.5, 6, dtype=torch.float64)
    step_sizes = step_sizes_of(APGD(steps=40), NET, X, Y, threat=Linf(eps))
    assert torch.allclose(step_sizes[0], 2 * eps)
    ratios = step_sizes[1:] / step_sizes[:-1]
    assert ((ratios == 1) | (ratios == 0.5)).all()
    assert (step_sizes[-1] < step_sizes[0]).all()
    assert len({tuple(row) for row in ratios.T.tolist()}) > 1, "the step size is one per example"


def test_checkpoints_are_those_of_the_paper():
    """Section 3.1: p = 0, 0.22, then 0.03 less each time down to 0.06; w = ceil(100 p)."""
    assert APGD().checkpoints == (22, 41, 57, 70, 80, 87, 93, 99)


def test_checkpoints_of_few_steps_increase_and_lie_within_them():
    for steps in range(1, 60):
        checkpoints = APGD(steps=steps).checkpoints
        assert all(a < b for a, b in pairwise((0, *checkpoints)))
        assert checkpoints[-1] <= steps


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr"])
def test_the_best_of_all_points_is_returned(loss):
    """By the loss that was minimised, over all restarts."""
    surrogate = Misclassify().with_surrogate_loss({"margin": _margin, "dlr": _dlr}.get(loss, _cross_entropy))
    target = Recorder(NET)
    result = APGD(steps=9, loss=loss, restarts=3)(Target(target), X, Y, threat=L2(2.0), keep="last")
    queried = target.inputs[1:31] if loss == "dlr" else target.inputs[:30]  # dlr queries x first
    losses = torch.stack([surrogate.loss(NET(x), Y) for x in queried])
    assert torch.allclose(surrogate.loss(NET(result.x_adv), Y), losses.amin(0), rtol=0, atol=1e-12)
    for number in range(3):
        assert torch.equal(queried[10 * number], start(L2(2.0), X, number))


def _margin(out, ref):
    rows = torch.arange(len(out))
    others = [out[i][[c for c in range(out.shape[1]) if c != ref[i]]].max() for i in rows]
    return torch.stack(others) - out[rows, ref]


def _dlr(out, ref):
    top = out.sort(1, descending=True).values
    return _margin(out, ref) / (top[:, 0] - top[:, 2])


def _cross_entropy(out, ref):
    return -out.log_softmax(1)[torch.arange(len(out)), ref]


def test_the_costs_are_counted():
    """One forward and one backward pass per point; besides, the clean input, the evaluation and, for dlr, a query of x."""
    for loss, queries_of_x in (("cross-entropy", 0), ("dlr", 1), ("targeted-dlr", 1)):
        result = APGD(steps=7, loss=loss, restarts=2, targets=1)(NET, X, Y, threat=Linf(1e-9))
        assert (result.backwards == 2 * 8).all()
        assert (result.forwards == 1 + queries_of_x + 2 * 8 + 1).all()


@dataclass(frozen=True)
class _BackAfterSuccess(Attack):
    """Crosses the boundary and returns; records the best point of the trajectory each time."""

    records: list

    def run(self, problem):
        trajectory = Trajectory(problem, problem.x)
        trajectory.move_to(1 - problem.x)
        self.records.append((trajectory.best.x_adv.clone(), trajectory.best.loss.clone()))
        trajectory.move_to(problem.x)
        self.records.append((trajectory.best.x_adv, trajectory.best.loss))
        return trajectory.best.x_adv


@pytest.mark.parametrize("keep", ["first", "best"])
def test_the_zero_returned_for_solved_examples_is_not_their_loss(keep):
    """The cross-entropy of a target class is above zero, so zero would be the lowest loss."""
    net = nn.Linear(2, 2, bias=False)
    net.load_state_dict({"weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    x, records = torch.tensor([[0.8, 0.2]]), []
    attack = _BackAfterSuccess(records)
    assert attack(net, x, torch.tensor([1]), goal=ClassifyAs(), threat=Linf(0.9), keep=keep).success.all()
    (first, loss), (later, loss_later) = records
    assert torch.equal(first, 1 - x)
    assert torch.equal(later, first)
    assert torch.equal(loss_later, loss)
    assert float(loss) == pytest.approx(0.4375, abs=1e-4)  # log(1 + exp(-0.6))


@pytest.mark.parametrize("threat", [Linf(0.2, bounds=None), L2(0.5, bounds=None), Linf(0.3)])
def test_on_a_linear_model_the_optimum_is_reached(threat):
    """The margin between two classes gains budget times dual norm; inside a box coordinate by coordinate."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    y = net(X).argmax(1)
    direction = (net[1].weight[1] - net[1].weight[0]).detach() * (1 - 2.0 * y.double()).unsqueeze(1)
    result = APGD(steps=30, loss="margin")(net, X, y, threat=threat, keep="last")
    gain = (direction * (result.x_adv - X).flatten(1)).sum(1)
    if threat.bounds is None:
        best = threat.eps * direction.norm(1 if isinstance(threat, Linf) else 2, dim=1)
    else:
        best = (direction.abs() * torch.where(direction > 0, 1 - X.flatten(1), X.flatten(1)).clamp(max=threat.eps)).sum(1)
    assert torch.allclose(gain, best, rtol=1e-6, atol=0)


class _Decoy(nn.Module):
    """Class 1 has the smallest margin but is out of reach; class 2 has a large margin and is reached by the second input."""

    def forward(self, x):
        zero = torch.zeros_like(x[:, 0])
        return torch.stack([zero, 0.05 * x[:, 0].tanh() - 0.1, 10.2 * x[:, 1] - 10, zero - 20], 1)


def test_only_targeted_runs_reach_the_second_class():
    net, x, y = _Decoy(), torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64)
    run = lambda **fields: APGD(steps=25, **fields)(net, x, y, threat=Linf(1.0, bounds=None))  # noqa: E731
    assert not run(loss="margin", restarts=3).success.any()
    assert not run(loss="dlr", restarts=3).success.any()
    assert not run(loss="targeted-dlr", targets=1).success.any()
    both = run(loss="targeted-dlr", targets=2)
    assert both.success.all()
    assert (net(both.x_adv).argmax(1) == 2).all()
    assert both.notes == ()


def test_a_targeted_goal_has_one_part():
    net, x, target = _Decoy(), torch.zeros(8, 2), torch.full((8,), 2)
    for loss in ("dlr", "targeted-dlr"):
        result = APGD(steps=25, loss=loss)(net, x, target, goal=ClassifyAs(), threat=Linf(1.0, bounds=None))
        assert result.success.all()


@pytest.mark.parametrize(
    ("classes", "loss", "goal", "note"),
    [
        (2, "dlr", Misclassify(), "dlr needs more than the model's 2 classes: the margin was used"),
        (2, "targeted-dlr", Misclassify(), "targeted-dlr needs more than the model's 2 classes: the margin was used"),
        (3, "dlr", Misclassify(), None),
        (3, "targeted-dlr", Misclassify(), "targeted-dlr towards one class needs more than the model's 3"),
        (3, "dlr", ClassifyAs(), "dlr towards one class needs more than the model's 3"),
        (4, "targeted-dlr", Misclassify(), None),
        (2, "cross-entropy", Misclassify(), None),
    ],
)
def test_with_few_classes_a_note_names_the_loss_that_was_used(classes, loss, goal, note):
    """Linear classes: where another class can be reached, it is."""
    torch.manual_seed(classes)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
    y = net(X).argmax(1)
    weight, scores = net[1].weight, net(X)
    reach = (scores.gather(1, y[:, None]) - scores) / (weight[None] - weight[y][:, None]).norm(1, dim=2)
    needed = reach.nan_to_num(torch.inf).scatter(1, y[:, None], torch.inf).amin(1)
    ref, eps = (y if goal == Misclassify() else (y + 1) % classes), 1.1 * needed.max().item()
    result = APGD(steps=15, loss=loss)(net, X, ref, goal=goal, threat=Linf(eps, bounds=None))
    assert goal == ClassifyAs() or result.success.all()
    notes = [message.why for message in result.notes if message.name == "loss"]
    assert len(notes) == (note is not None)
    assert note is None or notes[0].startswith(note)


@dataclass(frozen=True)
class _OneLoss(Goal):
    """The first output is below zero: a goal that has one loss only."""

    def loss(self, out, ref):
        return out[:, 0]

    def success(self, out, ref):
        return out[:, 0] < 0


@pytest.mark.parametrize("loss", ["cross-entropy", "margin", "dlr", "targeted-dlr"])
def test_a_goal_with_one_loss_keeps_it_which_is_noted(loss):
    x = torch.full((4, 3), 0.5)
    result = APGD(steps=5, loss=loss)(lambda x: x - 0.3, x, torch.zeros(4), goal=_OneLoss(), threat=Linf(0.25))
    assert result.success.all()
    assert [note.why for note in result.notes] == [f"_OneLoss() has a loss of its own, which was used instead of {loss}"]


def test_restarts_try_new_starts():
    """Without a gradient, an example is solved if and only if one of its starts lies far enough."""
    net = lambda x: torch.stack([0.5 * torch.ones(len(x)), (x[:, 0] > 0.95).float()], 1)  # noqa: E731
    x, threat = torch.full((40, 1), 0.5), Linf(0.5)
    draws = torch.stack([start(threat, x, number)[:, 0] > 0.95 for number in range(6)])
    result = APGD(steps=1, restarts=6)(net, x, torch.zeros(40, dtype=torch.int64), threat=threat)
    assert torch.equal(result.success, draws.any(0))
    assert 0 < int(draws[0].sum()) < int(draws.any(0).sum()) < 40


def test_a_nan_loss_is_never_the_best():
    values = iter([float("nan"), 3.0, 2.0, float("nan"), float("nan")])
    x = torch.full((1, 3), 0.5)
    target = Recorder(nn.Identity())
    result = APGD(steps=4)(Target(target), x, torch.zeros(1), goal=_Scripted(values), threat=Linf(0.25), keep="last")
    assert torch.equal(result.x_adv, target.inputs[2])


def test_invalid_fields_are_refused():
    for fields in ({"steps": 0}, {"restarts": 0}, {"targets": 0}, {"rho": 0}, {"rho": 1.5}, {"momentum": 1.5}, {"loss": "ce"}):
        with pytest.raises(ArgumentError, match=f"{next(iter(fields))}="):
            APGD(**fields)
    with pytest.raises(ArgumentError, match="it supports Linf, L2; for L1 there is L1APGD"):
        APGD()(NET, X, Y, threat=L1(1.0))
