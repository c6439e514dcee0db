import math

import pytest
import torch
from torch import nn

from robustkit import L1, L2, Linf
from robustkit.attacks.rays import RayS, _blocks
from robustkit.errors import ArgumentError
from robustkit.goals import ClassifyAs, Misclassify
from robustkit.testing.hyperplane import Halfspace
from robustkit.testing.nets import Counter

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 12, 3)).double()
X = torch.rand(6, 2, 3, 4, dtype=torch.float64)
Y = NET(X).argmax(1)
D = 24


class Recorder(nn.Module):
    """A model that records its inputs."""

    def __init__(self, net):
        super().__init__()
        self.net, self.inputs = net, []

    def forward(self, x):
        self.inputs.append(x.clone())
        return self.net(x)


class Decisions(nn.Module):
    """A model that returns only the predicted class."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return nn.functional.one_hot(self.net(x).argmax(1), 3).to(x)


class OutOfQueriesError(Exception):
    pass


def reference_rays(image, is_success, queries, unit, width, tolerance, box):
    """The nested loops of the paper for one image: the queried points, the best radius and the best signs.

    `is_success`: whether a predicted class is a success; `unit`: the move of each coordinate on a ray of length one.
    """
    queried = []

    def query(sign, radius):
        if len(queried) == queries:
            raise OutOfQueriesError
        point = (image.flatten() + radius * unit * torch.tensor(sign, dtype=torch.float64)).clamp(*box).reshape(image.shape)
        queried.append(point)
        return is_success(int(NET(point[None])[0].argmax()))

    signs, best = [1.0] * image.numel(), math.inf
    stage, block = 0, 0
    try:
        while True:
            size = math.ceil(len(signs) / 2**stage)
            first, last = block * size, min(len(signs), (block + 1) * size)
            trial = [-s if first <= j < last else s for j, s in enumerate(signs)]
            radius = min(best, width / unit)
            if query(trial, radius):
                signs, low = (trial, 0.0) if radius < best else (signs, 0.0)
                best = radius
                while best - low > tolerance:
                    middle = (low + best) / 2
                    if query(trial, middle):
                        signs, best = trial, middle
                    else:
                        low = middle
            elif best == math.inf:
                signs = trial
            block += 1
            if last == len(signs):
                stage, block = stage + 1, 0
    except OutOfQueriesError:
        return queried, best, signs


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.5, 1.5)])
@pytest.mark.parametrize(("threat", "unit"), [(Linf, 1.0), (L2, D**-0.5)])
@pytest.mark.parametrize("targeted", [False, True])
def test_the_queries_are_those_of_the_loops_of_the_paper(threat, unit, bounds, targeted):
    """A budget of the whole box needs no projection, so the last iterate is the best ray."""
    net, queries, width = Recorder(NET), 150, bounds[1] - bounds[0]
    eps = width if threat is Linf else width * D**0.5
    ref, goal = ((Y + 1) % 3, ClassifyAs()) if targeted else (Y, Misclassify())
    result = RayS(queries=queries)(net, X, ref, goal=goal, threat=threat(eps, bounds), keep="last")
    for i, x in enumerate(X):
        is_success = (lambda label, k=int(ref[i]): label == k) if targeted else (lambda label, k=int(ref[i]): label != k)
        queried, best, signs = reference_rays(x, is_success, queries, unit, width, 1e-3 * eps, bounds)
        ours = torch.stack([points[i] for points in net.inputs[:queries]])
        torch.testing.assert_close(ours, torch.stack(queried), rtol=0, atol=1e-12)
        last = x.flatten() + min(best, width / unit) * unit * torch.tensor(signs, dtype=torch.float64)
        torch.testing.assert_close(result.x_adv[i].flatten(), last.clamp(*bounds), rtol=0, atol=1e-12)


def random_hyperplane(seed):
    torch.manual_seed(seed)
    weight, x = torch.randn(2, 2, 3, dtype=torch.float64), torch.rand(8, 2, 2, 3, dtype=torch.float64)
    net = Halfspace(weight, 0.1)
    score = (x * weight).flatten(1).sum(1) + 0.1
    return net, x, (score > 0).long(), score.abs() / weight.abs().sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [Linf, L2])
def test_for_a_hyperplane_the_radius_is_the_distance(kind, seed):
    """The best sign vector is that of the weights: margin / |w|_1 in Linf, and sqrt(D) times that in L2."""
    net, x, y, distance = random_hyperplane(seed)
    optimum = distance if kind is Linf else distance * 12**0.5
    result = RayS(queries=500, tolerance=1e-4)(net, x, y, threat=kind(2 * optimum, None), keep="smallest")
    assert result.success.all()
    assert (result.size >= optimum * (1 - 1e-9)).all()
    assert (result.size <= optimum * 1.002).all(), result.size / optimum


@pytest.mark.parametrize("seed", range(3))
def test_a_hyperplane_is_crossed_if_and_only_if_the_budget_allows_it(seed):
    net, x, y, distance = random_hyperplane(seed)
    share = torch.tensor([0.9, 0.97, 1.03, 1.1] * 2, dtype=torch.float64)
    result = RayS(queries=500)(net, x, y, threat=Linf(distance * share, None))
    assert torch.equal(result.success, share > 1)


@pytest.mark.parametrize("keep", ["first", "smallest", "last"])
def test_only_the_decision_of_the_model_matters(keep):
    def nan_loss(out, ref):
        return out.sum(1) * torch.nan

    attack, threat = RayS(queries=120), Linf(0.3)
    expected = attack(NET, X, Y, threat=threat, keep=keep)
    by_decision = attack(Decisions(NET), X, Y, threat=threat, keep=keep)
    by_nan_loss = attack(NET, X, Y, goal=Misclassify(nan_loss), threat=threat, keep=keep)
    for other in (by_decision, by_nan_loss):
        for name in ("x_adv", "success", "size", "forwards"):
            assert torch.equal(getattr(expected, name), getattr(other, name)), name
    assert expected.success.any()


@pytest.mark.parametrize("length", [1, 2, 5, 12, 64])
def test_each_stage_flips_every_coordinate_once_and_blocks_halve(length):
    blocks = _blocks(length, 6 * length + 20).tolist()
    stage, covered = 0, 0
    for first, last in blocks:
        size = math.ceil(length / 2**stage)
        assert first == covered
        assert last == min(length, first + size)
        covered = last
        if covered == length:
            stage, covered = stage + 1, 0
    assert stage > math.log2(length)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.2)])
def test_both_directions_of_a_single_coordinate_are_tried(threat, up):
    def net(x):
        lead = (x[:, 0] - 0.6) if up else (0.4 - x[:, 0])
        return torch.stack([-lead, lead], 1)

    result = RayS(queries=15)(net, torch.full((1, 1), 0.5), torch.tensor([0]), threat=threat, keep="smallest")
    assert result.success.all()
    assert abs(float(result.size) - 0.1) < 1e-3


def test_a_failure_costs_all_queries_and_a_success_fewer():
    net = Counter(NET)
    result = RayS(queries=120)(net, X, Y, threat=Linf(0.19))
    assert int(result.forwards.sum()) == net.seen
    assert (result.forwards[~result.success] == 122).all()
    assert (result.forwards[result.success] < 122).all()
    assert 0 < result.success.sum() < len(X), result.success


def test_points_beyond_the_budget_are_queried_but_never_returned():
    net, eps = Recorder(NET), torch.tensor([0.02, 0.05, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    result = RayS(queries=60)(net, X, Y, threat=Linf(eps))
    assert max(float((points - X).abs().max()) for points in net.inputs if len(points) == len(X)) > 0.4
    assert min(float(points.min()) for points in net.inputs) >= 0
    assert max(float(points.max()) for points in net.inputs) <= 1
    assert (result.size <= eps + 1e-7).all()


def test_rows_of_a_table_are_supported():
    torch.manual_seed(3)
    net, x = nn.Linear(9, 3).double(), torch.rand(5, 9, dtype=torch.float64)
    flat = RayS(queries=80)(net, x, net(x).argmax(1), threat=Linf(0.2), keep="last")
    image = RayS(queries=80)(
        nn.Sequential(nn.Flatten(), net), x.reshape(5, 1, 3, 3), net(x).argmax(1), threat=Linf(0.2), keep="last"
    )
    assert torch.equal(flat.x_adv, image.x_adv.flatten(1))


@pytest.mark.parametrize("fields", [{"queries": 0}, {"queries": 2.0}, {"tolerance": 0.0}, {"tolerance": math.inf}])
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        RayS(**fields)


def test_unsupported_threats_are_refused():
    with pytest.raises(ArgumentError, match="it supports Linf, L2"):
        RayS()(NET, X, Y, threat=L1(1.0))
