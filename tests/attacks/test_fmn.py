import math
from itertools import combinations

import pytest
import torch
from torch import nn

from robustkit import L1, L2, ClassifyAs, Linf, Misclassify, Pixels, Target, zoo
from robustkit.attacks import FMN
from robustkit.data import load
from robustkit.errors import ArgumentError
from robustkit.goals import Goal

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
X = torch.rand(7, 1, 8, 8, dtype=torch.float64)
Y = NET(X).argmax(1)
DUAL = {Linf: 1, L2: 2, L1: math.inf}
NORM = {Linf: math.inf, L2: 2, L1: 1}


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same numbers whatever ran before: one of 410 draws puts an example within 4e-5 of a hyperplane."""
    torch.manual_seed(0)


def linear(weight, bias):
    net = nn.Linear(weight.shape[1], len(weight)).double()
    net.load_state_dict({"weight": weight, "bias": bias})
    return net


def margin_and_grad(x, y):
    """The signed logit margin to the decision boundary, and its gradient, for one image."""
    point = x.detach().requires_grad_()
    logits = NET(point[None])[0]
    margin = logits[y] - max(logits[k] for k in range(5) if k != y)
    return float(margin.detach()), torch.autograd.grad(margin, point)[0]


def reference_fmn(x, y, norm, steps, alpha, gamma, budget):
    """Algorithm 1 with the changes of the docstring, without a box, for one image, independent of the package."""
    delta, size, best, smallest = torch.zeros_like(x), math.inf, math.inf, None
    for k in range(steps):
        cosine = (1 + math.cos(math.pi * k / steps)) / 2
        g = 0.001 + (gamma - 0.001) * cosine
        a = alpha / 100 + (alpha - alpha / 100) * cosine
        margin, grad = margin_and_grad(x + delta, y)
        if margin < 0:
            if float(delta.norm(NORM[norm])) < best:
                best, smallest = float(delta.norm(NORM[norm])), delta
            size = min(size * (1 - g), best)
        elif best < math.inf:
            size = size * (1 + g)
        else:
            size = (float(delta.norm(NORM[norm])) + margin / float(grad.norm(DUAL[norm]))) * (1 + g)
        size = min(size, budget)
        if norm is Linf:
            delta = (delta - a * size * grad.sign()).clamp(-size, size)
        else:
            delta = delta - a * size * grad / grad.norm()
            delta = delta * min(1.0, size / float(delta.norm()))
    if margin_and_grad(x + delta, y)[0] < 0 and float(delta.norm(NORM[norm])) < best:  # the last point is evaluated too
        smallest = delta
    return x if smallest is None else x + smallest


@pytest.mark.parametrize("norm", [Linf, L2])
def test_fmn_equals_the_algorithm_of_the_docstring(norm):
    attack = FMN(steps=18, alpha=0.15, gamma=0.1)
    budget = {Linf: 0.3, L2: 1.5}[norm]
    result = attack(NET, X, Y, threat=norm(budget, bounds=None), keep="smallest")
    assert result.success.any()
    theirs = torch.stack([reference_fmn(x, int(y), norm, 18, 0.15, 0.1, budget) for x, y in zip(X, Y, strict=True)])
    assert torch.allclose(result.x_adv[result.success], theirs[result.success], rtol=0, atol=1e-9)
    assert torch.equal(result.success, (theirs != X).flatten(1).any(1))


def reference_l0_fmn(x, y, steps, gamma, budget):
    """The form for locations in the box [0, 1]: integer sizes, the corner of largest gain, the largest changes kept."""
    delta, size, best, smallest = torch.zeros_like(x), 1, 10**9, None
    for k in range(steps):
        cosine = (1 + math.cos(math.pi * k / steps)) / 2
        g, a = 0.001 + (gamma - 0.001) * cosine, 0.005 + 0.495 * cosine
        margin, grad = margin_and_grad(x + delta, y)
        if margin < 0:
            if int((delta != 0).sum()) < best:
                best, smallest = int((delta != 0).sum()), delta
            size = min(size - 1, math.floor(size * (1 - g)), best)
        else:
            size = max(size + 1, math.floor(size * (1 + g)))
        size = min(max(size, 1), budget)
        corner = (grad < 0).double() - x
        top = (-grad * corner).flatten().topk(size).indices
        change = torch.zeros(x.numel(), dtype=x.dtype).index_copy(0, top, corner.flatten()[top]).reshape(x.shape)
        delta = (x + delta + a * torch.where(change == 0, -delta, change)).clamp(0, 1) - x
        kept = delta.square().flatten().topk(size).indices
        delta = torch.zeros(x.numel(), dtype=x.dtype).index_copy(0, kept, delta.flatten()[kept]).reshape(x.shape)
    if margin_and_grad(x + delta, y)[0] < 0 and int((delta != 0).sum()) < best:
        smallest = delta
    return x if smallest is None else x + smallest


@pytest.mark.parametrize("gamma", [0.2, 0.6])
def test_for_pixels_fmn_equals_the_algorithm_of_the_docstring(gamma):
    result = FMN(steps=15, gamma=gamma)(NET, X, Y, threat=Pixels(12), keep="smallest")
    theirs = torch.stack([reference_l0_fmn(x, int(y), 15, gamma, 12) for x, y in zip(X, Y, strict=True)])
    assert result.success.any()
    assert torch.equal(result.success, (theirs != X).flatten(1).any(1))
    assert torch.equal(result.size[result.success], (theirs != X).flatten(1).sum(1).double()[result.success])
    assert torch.allclose(result.x_adv[result.success], theirs[result.success], rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [Linf, L2, L1])
@pytest.mark.parametrize(("goal", "classes"), [(Misclassify(), 2), (ClassifyAs(), 4)])
def test_on_linear_classes_the_size_is_the_distance_to_the_hyperplane(norm, goal, classes):
    """|f| / |w|_q in closed form, up to half a percent; the target of four classes has the nearest hyperplane."""
    weight, bias = torch.randn(classes, 12, dtype=torch.float64), torch.randn(classes, dtype=torch.float64)
    x = torch.rand(20, 12, dtype=torch.float64)
    scores = x @ weight.T + bias
    y = scores.argmax(1, keepdim=True)
    gap, slope = scores.gather(1, y) - scores, (weight[y] - weight).norm(DUAL[norm], 2)
    distance, nearest = (gap / slope).scatter(1, y, torch.inf).min(1)
    ref = nearest if goal == ClassifyAs() else y[:, 0]
    result = FMN()(linear(weight, bias), x, ref, goal=goal, threat=norm(50.0, bounds=(-100.0, 101.0)), keep="smallest")
    assert result.success.all()
    assert (result.size >= distance * (1 - 1e-9)).all()
    assert (result.size <= distance * 1.005).all()


def test_free_coordinates_replace_those_blocked_by_the_box():
    """f = sum(x) - 0.2 from x = (0, ..., 0, 0.4): only the last coordinate can decrease, and must by 0.2, in every norm."""
    weight = torch.stack([torch.ones(10), -torch.ones(10)]).double()
    x = torch.zeros(1, 10, dtype=torch.float64)
    x[0, 9] = 0.4
    net = linear(weight, torch.tensor([-0.2, 0.2], dtype=torch.float64))
    for threat in (Linf(0.5), L2(1.0), L1(3.0)):
        result = FMN()(net, x, torch.tensor([0]), threat=threat, keep="smallest")
        assert float(result.size) == pytest.approx(0.2, rel=0.005)
        # The first ball leaves out the blocked coordinates: one whole step is enough.
        assert FMN(steps=1, alpha=1.0)(net, x, torch.tensor([0]), threat=threat).success.all()


def fewest_pixels(slope, x, lead):
    """The smallest number of locations whose best colours raise the score by `lead`, by trying every subset."""
    gain = torch.maximum(slope * (1 - x), -slope * x).sum(0).flatten().tolist()
    for count in range(1, len(gain) + 1):
        if any(sum(chosen) > lead for chosen in combinations(gain, count)):
            return count
    return None


def test_on_a_linear_model_the_fewest_pixels_are_found():
    """Three channels of 3 x 3 locations around grey, so that the largest changes also have the largest gain."""
    weight = torch.randn(2, 27, dtype=torch.float64)
    x = 0.5 + 0.01 * torch.rand(7, 3, 3, 3, dtype=torch.float64)
    slope = (weight[0] - weight[1]).reshape(3, 3, 3)
    leads = torch.linspace(0.05, 0.9, 7, dtype=torch.float64) * slope.abs().sum() / 2
    net = nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).double()

    sizes, expected = [], []
    for i in range(7):
        bias = leads[i] - (slope * x[i]).sum()
        net.load_state_dict({"1.weight": weight, "1.bias": torch.stack([bias, torch.zeros_like(bias)])})
        assert net(x[i : i + 1]).argmax() == 0
        result = FMN(steps=40)(net, x[i : i + 1], torch.tensor([0]), threat=Pixels(9), keep="smallest")
        sizes.append(int(result.size) if result.success else None)
        expected.append(fewest_pixels(-slope, x[i], float(leads[i])))
    assert len(set(expected)) > 4
    assert sizes == expected


@pytest.mark.parametrize("norm", [Linf, L2, L1, Pixels])
def test_one_run_gives_the_whole_robustness_curve(norm):
    """The number of sizes up to eps equals the successes of a run with that budget, up to one image in forty."""
    part, net = load("digits").part(limit=40), zoo.load("digits-mlp")
    budget, smaller = {Linf: (0.3, (0.06, 0.12)), L2: (2.0, (0.4, 0.7)), L1: (5.0, (1.0, 2.0)), Pixels: (8, (1, 3))}[norm]
    whole = FMN(steps=50)(net, part.x, part.y, threat=norm(budget), keep="smallest")
    assert whole.success.all()
    for eps in smaller:
        alone = FMN(steps=50)(net, part.x, part.y, threat=norm(eps))
        assert 4 < int(alone.success.sum()) < 40
        assert abs(int((whole.size <= eps).sum()) - int(alone.success.sum())) <= 1


@pytest.mark.parametrize("norm", [Linf, L2, L1, Pixels])
def test_the_median_size_is_not_above_that_of_foolbox(norm):
    """Over 30 digits with 40 steps each; foolbox's perturbations are measured as ours are."""
    foolbox = pytest.importorskip("foolbox")
    part, net = load("digits").part(limit=30), zoo.load("digits-mlp")
    names = {Linf: "LInfFMNAttack", L2: "L2FMNAttack", L1: "L1FMNAttack", Pixels: "L0FMNAttack"}
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = getattr(foolbox.attacks, names[norm])(steps=40).run(model, part.x, foolbox.Misclassification(part.y))
    threat = norm({Linf: 1.0, L2: 8.0, L1: 64.0, Pixels: 64}[norm])
    size = torch.where(net(theirs).argmax(1) != part.y, threat.size(theirs, part.x), torch.inf)
    ours = FMN(steps=40)(net, part.x, part.y, threat=threat, keep="smallest")
    assert ours.success.all()
    assert ours.size.median() <= 1.02 * size.median()


def test_each_example_keeps_to_its_own_budget():
    budgets = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    result = FMN(steps=10)(NET, X, Y, threat=L2(budgets), keep="last")
    for i, budget in enumerate(budgets.tolist()):
        alone = FMN(steps=10)(NET, X[i : i + 1], Y[i : i + 1], threat=L2(budget), keep="last")
        assert torch.allclose(alone.x_adv, result.x_adv[i : i + 1], rtol=0, atol=1e-9)
    assert result.size[0] == pytest.approx(0.1)  # the projection of a search outside the ball would lie elsewhere


def test_misclassified_examples_need_no_perturbation():
    result = FMN(steps=5)(NET, X, (Y + 1) % 5, threat=L2(1.0), keep="smallest")
    assert (result.size == 0).all()
    assert (result.backwards == 0).all()
    assert result.success.all()


def test_a_tied_example_gets_a_tiny_perturbation():
    net = linear(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)).float()
    x = torch.full((1, 2), 0.5)
    for threat in (Linf(0.1), L2(0.1), L1(0.1)):
        result = FMN(steps=40)(net, x, net(x).argmax(1), threat=threat, keep="smallest")
        assert result.success.all()
        assert float(result.size) < 1e-5


def test_the_costs_are_counted():
    """One forward and one backward pass per step; besides: clean image, first success, last iterate, evaluation."""
    result = FMN(steps=20)(NET, X, Y, threat=L2(5.0), keep="smallest")
    assert result.success.all()
    assert (result.backwards == 20).all()
    assert (result.forwards == 20 + 4).all()
    first = FMN(steps=20)(NET, X, Y, threat=L2(5.0))
    assert (first.backwards < 20).all()
    assert (first.forwards == first.backwards + 2).all()


@pytest.mark.parametrize("push", [0.3, -0.3])
def test_success_is_decided_by_the_deployed_function(push):
    """The boundary of the view is at 0.5 - push, that of the deployed function at 0.5: only beyond the latter is a success."""
    net = linear(torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    shift = torch.tensor([-push, push], dtype=torch.float64)
    target = Target(lambda x: net(x), views={"other": lambda x: net(x) + shift})
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    result = FMN()(target, x, torch.tensor([0]), threat=L2(2.0, bounds=None), keep="smallest")
    assert result.success.all()
    assert 0.5 < float(result.size) < 0.9


class Away(Goal):
    """The output must be far from the reference; the gradient is zero at x itself."""

    vanishes_at_x = True

    def loss(self, out, ref):
        return 1 - (out - ref).square().flatten(1).sum(1)

    def success(self, out, ref):
        return (out - ref).square().flatten(1).sum(1) > 1


def test_goals_without_classes_or_a_gradient_at_x_are_supported():
    """The output is twice the input, so the smallest perturbation that moves it by one has norm one half."""
    x = torch.rand(6, 9, dtype=torch.float64)
    result = FMN()(lambda x: 2 * x, x, 2 * x, goal=Away(), threat=L2(3.0, bounds=None), keep="smallest")
    assert result.success.all()
    assert (result.size > 0.5).all()
    assert (result.size < 0.505).all()
    assert (result.flat == 0).all()


def test_a_model_without_a_gradient_is_flagged():
    result = FMN(steps=5)(lambda x: NET((x > 0.5).double()), X, NET((X > 0.5).double()).argmax(1), threat=Linf(0.01))
    assert "flat-gradients" in [flag.name for flag in result.flags]


@pytest.mark.parametrize("fields", [{"steps": 0}, {"alpha": 0.0}, {"gamma": 0.0}, {"gamma": 1.0}])
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        FMN(**fields)


@pytest.mark.slow
def test_balls_may_exceed_the_budget():
    """A network with thresholds, trained against Linf, in L2: 12 of 40 stay robust; with balls inside the budget 33."""
    part, net = load("mnist-5k").part(limit=40), zoo.load("mnist-cnn-robust")
    result = FMN()(net, part.x, part.y, threat=L2(2.0), keep="smallest")
    assert (~result.success).sum() <= 22
