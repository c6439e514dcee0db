import itertools
import math

import pytest
import torch
from torch import nn

from robustkit import L2, ClassifyAs, Pixels, PixelSearch, Target
from robustkit.attacks.pixels._locations import EffectMap, extremes
from robustkit.errors import ArgumentError, ShapeError
from robustkit.goals import Misclassify
from robustkit.losses import margin
from robustkit.testing.nets import Counter

EVERYTHING = 10_000


def net_of(seed, channels, size, classes=3):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * size * size, classes))
    return body.double()


def problem_of(seed, channels, size, n):
    net = net_of(seed, channels, size)
    x = torch.rand(n, channels, size, size, dtype=torch.float64)
    return net, x, net(x).argmax(1)


def by_brute_force(net, x, y, low, high):
    """Whether any location in any extreme colour changes the class of each image, one image after the other."""
    found = []
    for image, label in zip(x, y, strict=True):
        points = []
        for row, column in itertools.product(range(x.shape[2]), range(x.shape[3])):
            for colour in itertools.product([low, high], repeat=x.shape[1]):
                point = image.clone()
                point[:, row, column] = torch.tensor(colour, dtype=x.dtype)
                points.append(point)
        found.append(bool((net(torch.stack(points)).argmax(1) != label).any()))
    return torch.tensor(found)


@pytest.mark.parametrize(
    ("channels", "bounds", "shift"), [(1, (0.0, 1.0), 0.7), (2, (0.0, 1.0), 0.0), (3, (0.0, 1.0), 0.0), (3, (-2.0, 1.5), -2.0)]
)
def test_with_queries_for_everything_it_is_the_brute_force(channels, bounds, shift):
    net, x, y = problem_of(channels, channels, 4, 60)
    net[-1].bias.data -= shift * net(x).mean(0).detach()  # so that some can be solved, not all
    y = net(x).argmax(1)
    truth = by_brute_force(net, x, y, *bounds)
    result = PixelSearch(queries=EVERYTHING)(net, x, y, threat=Pixels(1, bounds))
    assert torch.equal(result.success, truth)
    assert 5 < truth.sum() < 55


def test_everything_is_asked_once_and_no_more():
    seen = []

    def never(x):
        seen.append(x)
        return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).mean(1) * 1e-3], 1)

    x = torch.rand(1, 3, 10, 9) * 0.9 + 0.05
    result = PixelSearch(queries=EVERYTHING, at_once=7)(never, x, torch.tensor([0]), threat=Pixels(1))
    changed = torch.cat(seen)
    single = changed[(changed != x).any(1).flatten(1).sum(1) == 1]
    assert not result.success.any()
    assert len(single.flatten(1).unique(dim=0)) == 90 * 8
    assert len(single) <= 90 * 8 + 1  # what the search ends at is judged again


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_on_a_linear_model_the_best_pixels_are_found(pixels):
    torch.manual_seed(pixels)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double(), torch.rand(20, 1, 4, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = (net[1].weight[0] - net[1].weight[1]).detach() * (2 * y[:, None] - 1)  # of the wrong class's lead
    start = (net(x)[:, 0] - net(x)[:, 1]).detach() * (2 * y - 1)
    gain = torch.maximum(slope * (1 - x.flatten(1)), -slope * x.flatten(1))
    best = start + gain.sort(1, descending=True).values[:, :pixels].sum(1)
    result = PixelSearch(queries=1000)(net, x, y, goal=Misclassify(margin), threat=Pixels(pixels), keep="last")
    torch.testing.assert_close((net(result.x_adv)[:, 0] - net(result.x_adv)[:, 1]).detach() * (2 * y - 1), best)


@pytest.mark.parametrize(("pixels", "channels"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_an_image_that_is_never_solved_costs_the_queries(pixels, channels):
    net = Counter(nn.Sequential(nn.Flatten(), nn.Linear(channels * 400, 2)))
    nn.init.zeros_(net.net[1].weight)
    nn.init.constant_(net.net[1].bias, 0)
    net.net[1].bias.data[0] = 5
    x = torch.rand(3, channels, 20, 20)
    result = PixelSearch(queries=90)(net, x, torch.zeros(3, dtype=torch.int64), threat=Pixels(pixels))
    tracks_best = 2  # x before the search, and what comes back
    assert result.forwards.tolist() == [90 * pixels + tracks_best] * 3
    assert int(result.forwards.sum()) == net.seen


def test_one_at_a_time_nothing_is_asked_after_the_success():
    net, x, y = problem_of(0, 1, 8, 40)
    result = PixelSearch()(net, x, y, threat=Pixels(1))
    for i in result.success.nonzero().flatten().tolist():
        seen = []
        one = Target(lambda z, seen=seen: (seen.append(z), net(z))[1], net, batch_size=1)
        alone = PixelSearch()(one, x[i : i + 1], y[i : i + 1], threat=Pixels(1), ids=torch.tensor([i]))
        assert torch.equal(alone.x_adv, result.x_adv[i : i + 1])
        wrong = [bool((net(z).argmax(1) != y[i]).any()) for z in seen]
        assert wrong.index(True) == len(wrong) - 2  # the last one is the judge's
    assert 3 < result.success.sum() < 40


@pytest.mark.parametrize("pixels", [1, 2])
def test_the_answer_does_not_depend_on_how_many_go_at_once(pixels):
    net, x, y = problem_of(3, 3, 12, 12)
    whole = PixelSearch(queries=150, at_once=8)(net, x, y, threat=Pixels(pixels))
    for size in (1, 5, 12):
        sizes = []
        target = Target(lambda z, sizes=sizes: (sizes.append(len(z)), net(z))[1], net, batch_size=size)
        parts = PixelSearch(queries=150, at_once=8)(target, x, y, threat=Pixels(pixels))
        assert max(sizes) <= size
        torch.testing.assert_close(parts.x_adv, whole.x_adv, rtol=0, atol=0)


def asked_of(attack, pixels):
    """All points that a search asks about on a net that cannot be fooled, one after the other, and the image."""
    torch.manual_seed(1)
    seen, slope = [], torch.randn(3 * 12 * 12) * 0.01

    def firm(x):
        seen.append(x)
        return torch.stack([5 + x.flatten(1) @ slope, -5 - x.flatten(1) @ slope], 1)

    x = torch.rand(1, 3, 12, 12) * 0.9 + 0.05
    attack(Target(firm, batch_size=1), x, torch.tensor([0]), threat=Pixels(pixels), keep="last")
    return torch.cat(seen), x


def test_a_quarter_of_the_queries_goes_to_the_other_colours():
    points, x = asked_of(PixelSearch(queries=201), 1)
    values = [point[:, (point != x[0]).any(0)].flatten().tolist() for point in points[:201]]
    mixed = [len(set(colour)) == 2 for colour in values]
    assert sum(mixed) == 50
    assert all(mixed[151:])


def test_candidates_are_sets_of_different_pixels():
    points, x = asked_of(PixelSearch(queries=100, at_once=9), 3)
    sizes = (points != x).any(1).flatten(1).sum(1).tolist()
    assert sizes[:38] == [0] + [1] * 36 + [3]  # x, a grid of six by six, the best of it together
    for refill in range(38, 280, 10):
        assert sizes[refill : refill + 10] == [2] + [3] * 9


def test_the_set_that_is_there_is_not_asked_about_again():
    """Its loss is known; told again in a batch of another size it may be a rounding lower, which would be no progress."""
    points, x = asked_of(PixelSearch(queries=100, at_once=9), 3)
    torch.manual_seed(1)
    lead = points.flatten(1) @ (torch.randn(3 * 12 * 12) * 0.01)
    sets = torch.arange(len(points)) >= 37  # x and the grid come before
    for refill in range(38, 68, 10):  # without success three times in a row it would begin anew
        triple = sets[:refill] & ((points[:refill] != x).any(1).flatten(1).sum(1) == 3)
        there = int(torch.where(triple, lead[:refill], 9).argmin())
        assert not (points[refill : refill + 10] == points[there]).flatten(1).all(1).any()


def test_with_two_pixels_it_is_the_brute_force_too():
    """Over all pairs of locations in black and white; no theorem, but so small an image leaves nothing out."""
    net, x, y = problem_of(11, 1, 4, 40)
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


def test_a_search_that_is_stuck_begins_anew():
    """Only two pixels together do anything: no single one shows the way."""

    def pair(x):
        both = (x[:, 0, 1, 2] < 0.1) & (x[:, 0, 3, 3] < 0.1)
        return torch.stack([torch.full_like(both, 0.5, dtype=x.dtype), both.to(x)], 1)

    x = torch.full((6, 1, 5, 5), 0.6)
    x[:, 0, 4, 4] = 1.0  # more to change, yet of no use
    x[:, 0, 0, 0] = 1.0
    result = PixelSearch(queries=10_000, at_once=60)(pair, x, torch.zeros(6, dtype=torch.int64), threat=Pixels(2))
    assert result.success.all()
    assert len(result.forwards.unique()) > 1  # each image draws its own sets


def test_each_image_keeps_to_its_own_budget():
    net, x, y = problem_of(5, 3, 6, 6)
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


def test_a_wanted_class_is_reached():
    net, x, y = problem_of(7, 3, 5, 30)
    wanted = (y + 1) % 3
    result = PixelSearch()(net, x, wanted, goal=ClassifyAs(), threat=Pixels(2))
    assert torch.equal(result.success, net(result.x_adv).argmax(1) == wanted)
    assert result.success.any()


@pytest.mark.parametrize(("channels", "count"), [(1, 2), (2, 4), (3, 8), (5, 12)])
def test_extreme_colours_are_different_and_at_the_ends(channels, count):
    colours = extremes(torch.zeros(1, channels, 2, 2), Pixels(1, bounds=(-1.0, 2.0)))
    assert len({tuple(colour) for colour in colours.tolist()}) == len(colours) == count
    assert set(colours.flatten().tolist()) == {-1.0, 2.0}
    assert colours[0].tolist() == [-1.0] * channels
    assert colours[1].tolist() == [2.0] * channels


def test_the_promise_is_the_weighted_regression_it_is_said_to_be():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 7)
    field = EffectMap(x, Pixels(1))
    candidates = torch.stack([torch.randperm(84)[:9] for _ in range(2)])
    effects = torch.randn(2, 9, dtype=torch.float64)
    field.learn(candidates, effects)
    acquisition = field.acquisition()
    for i in range(2):
        typical = math.sqrt(sum(float(e) ** 2 for e in effects[i]) / 9)
        for colour, row, column in itertools.product(range(2), range(6), range(7)):
            own = max(0.02, sum(abs(colour - float(x[i, c, row, column])) for c in range(3)) / 3)
            pull, weight = 0.0, 0.25
            for number, effect in zip(candidates[i].tolist(), effects[i].tolist(), strict=True):
                there, (r, c) = number // 42, divmod(number % 42, 7)
                if there == colour and abs(r - row) <= 4 and abs(c - column) <= 4:
                    near = math.exp(-abs(r - row) - abs(c - column))
                    change = max(0.02, sum(abs(there - float(x[i, k, r, c])) for k in range(3)) / 3)
                    pull, weight = pull + near * change * effect, weight + near * change**2
            expected = own * (pull / weight + 0.5 * typical / math.sqrt(weight))
            assert float(acquisition[i, colour * 42 + row * 7 + column]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (28, 28), (1, 40), (3, 17), (100, 60)])
def test_the_first_grid_covers_the_image(shape):
    x = torch.rand(3, 1, *shape)
    field = EffectMap(x, Pixels(1))
    places = shape[0] * shape[1]
    both, far = field.grid(both=True), field.grid(both=False)
    assert both.shape[1] == 2 * far.shape[1] <= 128
    assert torch.equal((far % places).sort(1).values, both.sort(1).values[:, : far.shape[1]])
    step = -(-max(shape) // 8)
    asked = torch.zeros(places, dtype=torch.bool)
    asked[far[0] % places] = True
    near = nn.functional.max_pool2d(asked.reshape(1, 1, *shape).float(), 2 * step - 1, 1, step - 1)
    assert (near == 1).all()  # no location is further than a step from one that is asked
    assert torch.equal(far // places, (x.flatten(1).gather(1, far % places) < 0.5).long())
    contrast = field.contrast.gather(1, both)
    assert torch.equal(contrast, contrast.sort(1, descending=True).values)


@pytest.mark.parametrize(
    "fields", [{"pixels": 0}, {"pixels": 1.5}, {"queries": 2}, {"queries": 2.5}, {"at_once": 0}, {"at_once": True}]
)
def test_senseless_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        PixelSearch(**fields)


def test_threats_and_shapes_that_it_does_not_serve_are_refused():
    net, x, y = problem_of(0, 1, 4, 2)
    with pytest.raises(ArgumentError, match="serves Pixels"):
        PixelSearch()(net, x, y, threat=L2(1.0))
    with pytest.raises(ArgumentError, match="pixels=4 is more than"):
        PixelSearch(pixels=4)(net, x, y, threat=Pixels(torch.tensor([1.0, 3.0])))
    with pytest.raises(ArgumentError, match="17"):
        PixelSearch()(net, x, y, threat=Pixels(17))
    with pytest.raises(ShapeError, match="images"):
        PixelSearch()(nn.Linear(16, 3).double(), x.flatten(1), y, threat=Pixels(1))
