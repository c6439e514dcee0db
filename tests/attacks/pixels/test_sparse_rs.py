import pytest
import torch
from torch import nn

from robustkit import L1, Pixels
from robustkit._engine.noise import Noise
from robustkit.attacks import SparseRS
from robustkit.errors import ArgumentError
from robustkit.goals import Misclassify
from robustkit.losses import margin
from robustkit.testing.nets import Counter

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 30, 4)).double()
X = torch.rand(7, 3, 5, 6, dtype=torch.float64)
Y = NET(X).argmax(1)


def share_by_the_paper(query, queries):
    """Section 4 of the paper and the authors' code: a schedule for 10,000 queries, rescaled."""
    query = int(query / queries * 10_000)
    steps = {0: 2, 50: 4, 200: 5, 500: 6, 1000: 8, 2000: 10, 4000: 12, 6000: 15, 8000: 20}
    begun = [divisor for begin, divisor in steps.items() if query > begin]
    return 0.3 / begun[-1] if begun else 0.3


def loss_of(image, label):
    logits = NET(image[None])[0].detach()
    return float(logits[label] - max(logits[k] for k in range(4) if k != label))


def reference_sparse_rs(i, count, queries, low, high):
    """Algorithms 1 and 2 for one image, in plain Python; only the random numbers are the package's."""
    noise = Noise(5, torch.tensor([i]))

    def colours(source, number):
        bits = source.at("colour").bits(number, 3)[0]
        return [tuple(high if int(bit) & 1 else low for bit in row) for row in bits]

    def paint(pixels):
        image = X[i].clone()
        for (row, column), colour in pixels:
            image[:, row, column] = torch.tensor(colour, dtype=image.dtype)
        return image

    start = noise.at("start")
    rank = start.at("place").uniform(30)[0].tolist()
    order = sorted(range(30), key=lambda place: rank[place])
    pixels = [(divmod(place, 6), colour) for place, colour in zip(order[:count], colours(start, count), strict=True)]
    lowest = loss_of(paint(pixels), int(Y[i]))
    for query in range(1, queries):
        draw = noise.at("query", query)
        swaps = max(1, int(share_by_the_paper(query, queries) * count))
        slot_rank = draw.at("slot").uniform(count)[0].tolist()
        slots = sorted(range(count), key=lambda slot: slot_rank[slot])[:swaps]
        rank = draw.at("place").uniform(30)[0].tolist()
        used = {row * 6 + column for (row, column), _ in pixels}
        unused = sorted((place for place in range(30) if place not in used), key=lambda place: rank[place])
        changed = list(pixels)
        for slot, place, colour in zip(slots, unused, colours(draw, swaps), strict=False):
            changed[slot] = (divmod(place, 6), colour)
        value = loss_of(paint(changed), int(Y[i]))
        if value < lowest:
            pixels, lowest = changed, value
    return paint(pixels)


@pytest.mark.parametrize(("count", "bounds"), [(1, (0.0, 1.0)), (4, (0.0, 1.0)), (14, (-1.0, 2.0))])
def test_it_equals_the_algorithm_of_the_paper(count, bounds):
    attack = SparseRS(queries=40)
    result = attack(NET, X, Y, goal=Misclassify(margin), threat=Pixels(count, bounds), seed=5, keep="last")
    for i in range(len(X)):
        assert torch.equal(result.x_adv[i], reference_sparse_rs(i, count, 40, *bounds))


@pytest.mark.parametrize("queries", [10_000, 1000, 300])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_the_schedule_is_that_of_the_paper(queries, count):
    attack = SparseRS(queries=queries)
    for query in range(1, queries):
        assert attack.swaps(query, count) == max(1, int(share_by_the_paper(query, queries) * count))
    assert SparseRS(queries=10_000).swaps(1, 100) == 15
    assert SparseRS(queries=10_000).swaps(9000, 100) == 1


@pytest.mark.slow
def test_where_few_locations_are_unused_pixels_return_in_other_colours():
    """Three of four locations: the attack still finds the best corner of a linear model, and no location occurs twice."""
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double(), torch.rand(5, 1, 2, 2, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = (net[1].weight[0] - net[1].weight[1]).detach() * (2 * y[:, None] - 1)
    corner = (slope > 0).double()
    gain = slope * (corner - x.flatten(1))
    best = torch.where(gain > gain.amin(1, keepdim=True), corner, x.flatten(1))
    result = SparseRS(queries=600)(net, x, y, goal=Misclassify(margin), threat=Pixels(3), keep="last")
    assert torch.equal(result.x_adv.flatten(1), best)


@pytest.mark.slow
def test_on_a_linear_model_the_best_pixel_is_found():
    torch.manual_seed(2)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double(), torch.rand(8, 1, 3, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = ((net[1].weight[0] - net[1].weight[1]).detach() * (2 * y[:, None] - 1)).reshape(x.shape)
    gain = torch.maximum(slope * (1 - x), -slope * x).sum(1).flatten(1)
    result = SparseRS(queries=600)(net, x, y, goal=Misclassify(margin), threat=Pixels(1), keep="last")
    gained = (net(result.x_adv) - net(x)).detach()
    torch.testing.assert_close((gained[:, 0] - gained[:, 1]) * (2 * y - 1), gain.amax(1))


def test_a_failure_costs_all_queries_and_a_success_fewer():
    net = Counter(NET)
    result = SparseRS(queries=50)(net, X, Y, threat=Pixels(1))
    assert int(result.forwards.sum()) == net.seen
    assert (result.forwards[~result.success] == 52).all()
    assert (result.forwards[result.success] < 52).any()
    assert 0 < result.success.sum() < len(X), result.success


def test_each_image_keeps_to_its_own_budget():
    budgets = torch.tensor([1.0, 3.0, 2.0, 1.0, 3.0, 2.0, 5.0])
    result = SparseRS(queries=20)(NET, X, Y, threat=Pixels(budgets), keep="best")
    assert torch.equal(result.size, budgets.double())
    fewer = SparseRS(pixels=2, queries=20)(NET, X, Y, threat=Pixels(budgets), keep="best")
    assert torch.equal(fewer.size, budgets.clamp(max=2).double())


def test_a_nan_loss_is_never_accepted():
    def partly_nan(x):
        even = (x == 1).flatten(1).sum(1) % 2 == 0
        return torch.where(even[:, None], torch.nan, NET(x))

    class Never(Misclassify):
        def success(self, out, ref):
            return torch.zeros_like(ref, dtype=torch.bool)

    one, many = (
        SparseRS(queries=q)(partly_nan, X, Y, goal=Never(margin), threat=Pixels(1), keep="last").x_adv for q in (1, 30)
    )
    assert partly_nan(one).isnan().any()
    assert not partly_nan(many).isnan().any()


@pytest.mark.parametrize("fields", [{"pixels": 0}, {"queries": 0}, {"queries": 1.5}, {"alpha": 0.0}, {"alpha": 2.5}])
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        SparseRS(**fields)


def test_unsupported_threats_are_refused():
    with pytest.raises(ArgumentError, match="it supports Pixels"):
        SparseRS()(NET, X, Y, threat=L1(1.0))
    with pytest.raises(ArgumentError, match="pixels=3 is more than"):
        SparseRS(pixels=3)(NET, X, Y, threat=Pixels(2))
