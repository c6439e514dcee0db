import itertools
import math

import pytest
import torch
from torch import nn

from robustkit import L2, ClassifyAs, Pixels, PixelSearch, Target
from robustkit.attacks.pixels._locations import EffectMap, extreme_colours
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Misclassify
from robustkit.losses import margin
from robustkit.testing.nets import Counter

ALL_QUERIES = 10_000


def make_net(seed, channels, size, classes=3):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * size * size, classes))
    return body.double()


def make_problem(seed, channels, size, n):
    net = make_net(seed, channels, size)
    x = torch.rand(n, channels, size, size, dtype=torch.float64)
    return net, x, net(x).argmax(1)


def brute_force(net, x, y, low, high):
    """Whether any location in any extreme colour changes the class of each image, (N,) bool."""
    is_fooled = []
    for image, label in zip(x, y, strict=True):
        points = []
        for row, column in itertools.product(range(x.shape[2]), range(x.shape[3])):
            for colour in itertools.product([low, high], repeat=x.shape[1]):
                point = image.clone()
                point[:, row, column] = torch.tensor(colour, dtype=x.dtype)
                points.append(point)
        is_fooled.append(bool((net(torch.stack(points)).argmax(1) != label).any()))
    return torch.tensor(is_fooled)


@pytest.mark.parametrize(
    ("channels", "bounds", "shift"), [(1, (0.0, 1.0), 0.7), (2, (0.0, 1.0), 0.0), (3, (0.0, 1.0), 0.0), (3, (-2.0, 1.5), -2.0)]
)
def test_with_enough_queries_it_equals_brute_force(channels, bounds, shift):
    net, x, y = make_problem(channels, channels, 4, 60)
    net[-1].bias.data -= shift * net(x).mean(0).detach()  # so that some can be solved, not all
    y = net(x).argmax(1)
    truth = brute_force(net, x, y, *bounds)
    result = PixelSearch(queries=ALL_QUERIES)(net, x, y, threat=Pixels(1, bounds))
    assert torch.equal(result.success, truth)
    assert 5 < truth.sum() < 55


def test_every_candidate_is_queried_exactly_once():
    queried = []

    def never_fooled(x):
        queried.append(x)
        return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).mean(1) * 1e-3], 1)

    x = torch.rand(1, 3, 10, 9) * 0.9 + 0.05
    result = PixelSearch(queries=ALL_QUERIES, at_once=7)(never_fooled, x, torch.tensor([0]), threat=Pixels(1))
    changed = torch.cat(queried)
    single = changed[(changed != x).any(1).flatten(1).sum(1) == 1]
    assert not result.success.any()
    assert len(single.flatten(1).unique(dim=0)) == 90 * 8
    assert len(single) <= 90 * 8 + 1  # the result of the search is evaluated once more


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_on_a_linear_model_the_best_pixels_are_found(pixels):
    torch.manual_seed(pixels)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), torch.rand(20, 1, 4, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = (net[1].weight[0] - net[1].weight[1]).detach() * (2 * y[:, None] - 1)  # of the margin of the wrong class
    start = (net(x)[:, 0] - net(x)[:, 1]).detach() * (2 * y - 1)
    gain = torch.maximum(slope * (1 - x.flatten(1)), -slope * x.flatten(1))
    best = start + gain.sort(1, descending=True).values[:, :pixels].sum(1)
    result = PixelSearch(queries=1000)(net, x, y, goal=Misclassify(margin), threat=Pixels(pixels), keep="last")
    torch.testing.assert_close((net(result.x_adv)[:, 0] - net(result.x_adv)[:, 1]).detach() * (2 * y - 1), best)


@pytest.mark.parametrize(("pixels", "channels"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_an_unsolved_image_costs_all_queries(pixels, channels):
    net = Counter(nn.Sequential(nn.Flatten(), nn.Linear(channels * 400, 2)))
    nn.init.zeros_(net.net[1].weight)
    nn.init.constant_(net.net[1].bias, 0)
    net.net[1].bias.data[0] = 5
    x = torch.rand(3, channels, 20, 20)
    result = PixelSearch(queries=90)(net, x, torch.zeros(3, dtype=torch.int64), threat=Pixels(pixels))
    evaluations = 2  # of x before the search, and of the result
    assert result.forwards.tolist() == [90 * pixels + evaluations] * 3
    assert int(result.forwards.sum()) == net.seen


def test_nothing_is_queried_after_the_first_success():
    net, x, y = make_problem(0, 1, 8, 40)
    result = PixelSearch()(net, x, y, threat=Pixels(1))
    for i in result.success.nonzero().flatten().tolist():
        queried = []
        one = Target(lambda z, queried=queried: (queried.append(z), net(z))[1], net, batch_size=1)
        alone = PixelSearch()(one, x[i : i + 1], y[i : i + 1], threat=Pixels(1), ids=torch.tensor([i]))
        assert torch.equal(alone.x_adv, result.x_adv[i : i + 1])
        wrong = [bool((net(z).argmax(1) != y[i]).any()) for z in queried]
        assert wrong.index(True) == len(wrong) - 2  # the last one is the evaluation
    assert 3 < result.success.sum() < 40


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [1, 2])
def test_the_result_does_not_depend_on_the_batch_size(pixels):
    net, x, y = make_problem(3, 3, 12, 12)
    whole = PixelSearch(queries=150, at_once=8)(net, x, y, threat=Pixels(pixels))
    for size in (1, 5, 12):
        sizes = []
        target = Target(lambda z, sizes=sizes: (sizes.append(len(z)), net(z))[1], net, batch_size=size)
        parts = PixelSearch(queries=150, at_once=8)(target, x, y, threat=Pixels(pixels))
        assert max(sizes) <= size
        torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=0)


def queries_of(attack, pixels):
    """All points that a search queries on a model that cannot be fooled, in order, and the image."""
    torch.manual_seed(1)
    queried, slope = [], torch.randn(3 * 12 * 12) * 0.01

    def robust(x):
        queried.append(x)
        return torch.stack([5 + x.flatten(1) @ slope, -5 - x.flatten(1) @ slope], 1)

    x = torch.rand(1, 3, 12, 12) * 0.9 + 0.05
    attack(Target(robust, batch_size=1), x, torch.tensor([0]), threat=Pixels(pixels), keep="last")
    return torch.cat(queried), x


def test_the_last_quarter_of_the_queries_tries_the_other_colours():
    points, x = queries_of(PixelSearch(queries=201), 1)
    values = [point[:, (point != x[0]).any(0)].flatten().tolist() for point in points[:201]]
    mixed = [len(set(colour)) == 2 for colour in values]
    assert sum(mixed) == 50
    assert all(mixed[151:])


def test_candidates_are_sets_of_different_pixels():
    points, x = queries_of(PixelSearch(queries=100, at_once=9), 3)
    sizes = (points != x).any(1).flatten(1).sum(1).tolist()
    assert sizes[:38] == [0] + [1] * 36 + [3]  # x, a grid of six by six, the best pixels of it together
    for first in range(38, 280, 10):
        assert sizes[first : first + 10] == [2] + [3] * 9


def test_the_current_set_is_not_queried_again():
    """Its loss is known; rounding in a batch of another size could make it look lower, which is no progress."""
    points, x = queries_of(PixelSearch(queries=100, at_once=9), 3)
    torch.manual_seed(1)
    loss = points.flatten(1) @ (torch.randn(3 * 12 * 12) * 0.01)
    sets = torch.arange(len(points)) >= 37  # x and the grid come before
    for first in range(38, 68, 10):  # after three turns without a change it would restart
        triple = sets[:first] & ((points[:first] != x).any(1).flatten(1).sum(1) == 3)
        current = int(torch.where(triple, loss[:first], 9).argmin())
        assert not (points[first : first + 10] == points[current]).flatten(1).all(1).any()


def test_with_two_pixels_it_equals_brute_force_too():
    """Over all pairs of locations in black and white; no theorem, but in so small an image nothing is missed."""
    net, x, y = make_problem(11, 1, 4, 40)
    truth = []
    for image, label in zip(x, y, strict=True):
        sets = [
            (a, b, c, d) for a, b in itertools.combinations(range(16), 2) for c, d in itertools.product([0.0, 1.0], repeat=2)
        ]
        points = image.flatten().repeat(len(sets), 1)
        for point, (a, b, c, d) in zip(points, sets, strict=True):
            point[a], point[b] = c, d
        truth.append(bool((net(points.reshape(-1, 1, 4, 4)).argmax(1) != label).any()))
    result = PixelSearch(queries=2000)(net, x, y, threat=Pixels(2))
    assert torch.equal(result.success, torch.tensor(truth))


def test_a_stalled_search_restarts():
    """Only two pixels together have an effect, single ones have none."""

    def pair(x):
        both = (x[:, 0, 1, 2] < 0.1) & (x[:, 0, 3, 3] < 0.1)
        return torch.stack([torch.full_like(both, 0.5, dtype=x.dtype), both.to(x)], 1)

    x = torch.full((6, 1, 5, 5), 0.6)
    x[:, 0, 4, 4] = 1.0  # higher contrast, but no effect
    x[:, 0, 0, 0] = 1.0
    result = PixelSearch(queries=10_000, at_once=60)(pair, x, torch.zeros(6, dtype=torch.int64), threat=Pixels(2))
    assert result.success.all()
    assert len(result.forwards.unique()) > 1  # each image draws its own sets


def test_each_image_keeps_to_its_own_budget():
    net, x, y = make_problem(5, 3, 6, 6)
    budgets = torch.tensor([1.0, 3.0, 2.0, 1.0, 3.0, 2.0])
    result = PixelSearch(queries=60)(net, x, y, threat=Pixels(budgets), keep="best")
    assert (result.size <= budgets).all()
    assert (result.size == budgets).any()
    fewer = PixelSearch(pixels=2, queries=60)(net, x, y, threat=Pixels(budgets), keep="best")
    assert (fewer.size <= budgets.clamp(max=2)).all()
    for i in range(6):
        alone = PixelSearch(queries=60)(
            net, x[i : i + 1], y[i : i + 1], threat=Pixels(int(budgets[i])), keep="best", ids=torch.tensor([i])
        )
        assert torch.equal(alone.x_adv, result.x_adv[i : i + 1])


def test_a_target_class_is_reached():
    net, x, y = make_problem(7, 3, 5, 30)
    target = (y + 1) % 3
    result = PixelSearch()(net, x, target, goal=ClassifyAs(), threat=Pixels(2))
    assert torch.equal(result.success, net(result.x_adv).argmax(1) == target)
    assert result.success.any()


@pytest.mark.parametrize(("channels", "count"), [(1, 2), (2, 4), (3, 8), (5, 12)])
def test_extreme_colours_are_distinct_and_at_the_bounds(channels, count):
    colours = extreme_colours(torch.zeros(1, channels, 2, 2), Pixels(1, bounds=(-1.0, 2.0)))
    assert len({tuple(colour) for colour in colours.tolist()}) == len(colours) == count
    assert set(colours.flatten().tolist()) == {-1.0, 2.0}
    assert colours[0].tolist() == [-1.0] * channels
    assert colours[1].tolist() == [2.0] * channels


def test_the_acquisition_function_is_the_documented_regression():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 7)
    effect_map = EffectMap(x, Pixels(1))
    candidates = torch.stack([torch.randperm(84)[:9] for _ in range(2)])
    effects = torch.randn(2, 9, dtype=torch.float64)
    effect_map.update(candidates, effects)
    acquisition = effect_map.acquisition()
    for i in range(2):
        typical = math.sqrt(sum(float(e) ** 2 for e in effects[i]) / 9)
        for colour, row, column in itertools.product(range(2), range(6), range(7)):
            own = max(0.02, sum(abs(colour - float(x[i, c, row, column])) for c in range(3)) / 3)
            product, weight = 0.0, 0.25
            for number, effect in zip(candidates[i].tolist(), effects[i].tolist(), strict=True):
                other_colour, (r, c) = number // 42, divmod(number % 42, 7)
                if other_colour == colour and abs(r - row) <= 4 and abs(c - column) <= 4:
                    weight_nearby = math.exp(-abs(r - row) - abs(c - column))
                    contrast = max(0.02, sum(abs(other_colour - float(x[i, k, r, c])) for k in range(3)) / 3)
                    product, weight = product + weight_nearby * contrast * effect, weight + weight_nearby * contrast**2
            expected = own * (product / weight + 0.5 * typical / math.sqrt(weight))
            assert float(acquisition[i, colour * 42 + row * 7 + column]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (28, 28), (1, 40), (3, 17), (100, 60)])
def test_the_first_grid_covers_the_image(shape):
    x = torch.rand(3, 1, *shape)
    effect_map = EffectMap(x, Pixels(1))
    locations = shape[0] * shape[1]
    both, one = effect_map.grid(both_colours=True), effect_map.grid(both_colours=False)
    assert both.shape[1] == 2 * one.shape[1] <= 128
    assert torch.equal((one % locations).sort(1).values, both.sort(1).values[:, : one.shape[1]])
    step = -(-max(shape) // 8)
    in_grid = torch.zeros(locations, dtype=torch.bool)
    in_grid[one[0] % locations] = True
    covered = nn.functional.max_pool2d(in_grid.reshape(1, 1, *shape).float(), 2 * step - 1, 1, step - 1)
    assert (covered == 1).all()  # every location is less than a step from one of the grid
    assert torch.equal(one // locations, (x.flatten(1).gather(1, one % locations) < 0.5).long())
    contrast = effect_map.contrast.gather(1, both)
    assert torch.equal(contrast, contrast.sort(1, descending=True).values)


@pytest.mark.parametrize(
    "fields", [{"pixels": 0}, {"pixels": 1.5}, {"queries": 2}, {"queries": 2.5}, {"at_once": 0}, {"at_once": True}]
)
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        PixelSearch(**fields)


def test_unsupported_threats_and_data_are_refused():
    net, x, y = make_problem(0, 1, 4, 2)
    with pytest.raises(ArgumentError, match="it supports Pixels"):
        PixelSearch()(net, x, y, threat=L2(1.0))
    with pytest.raises(ArgumentError, match="pixels=4 is more than"):
        PixelSearch(pixels=4)(net, x, y, threat=Pixels(torch.tensor([1.0, 3.0])))
    with pytest.raises(ArgumentError, match="17"):
        PixelSearch()(net, x, y, threat=Pixels(17))
    with pytest.raises(ShapeError, match="images"):
        PixelSearch()(nn.Linear(16, 3).double(), x.flatten(1), y, threat=Pixels(1))
