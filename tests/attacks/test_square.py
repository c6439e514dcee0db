import math

import pytest
import torch
from torch import nn

from robustkit import L1, L2, Linf
from robustkit._engine.noise import Noise
from robustkit.attacks import Square
from robustkit.attacks._square_patches import patch_shape
from robustkit.errors import ArgumentError
from robustkit.goals import Misclassify
from robustkit.losses import margin
from robustkit.testing.nets import Counter


def make_problem(channels, seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 42, 4)).double()
    x = torch.rand(4, channels, 6, 7, dtype=torch.float64)
    return net, x, net(x).argmax(1)


class ConstantModel(nn.Module):
    """A model with a constant output, which records its inputs: no candidate is ever accepted."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.clone())
        return torch.tensor([1.0, 0.0]).to(x).expand(len(x), 2)


def loss_of(net, image, label):
    logits = net(image[None])[0].detach().tolist()
    return logits[label] - max(value for k, value in enumerate(logits) if k != label)


def p_by_the_paper(query, queries):
    """Halved after these of 10,000 queries (section 5 of the paper); rescaled and rounded as in the authors' code."""
    query = int(query / queries * 10_000)
    return 0.8 / 2 ** len([begin for begin in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000) if query > begin])


def side_by_the_paper(query, queries, x):
    return max(1, round(math.sqrt(p_by_the_paper(query, queries) * x[0].numel())))


def reference_search(net, label, first, candidates):
    """Algorithm 1: `candidates` map the current image to a candidate."""
    image, lowest = first, loss_of(net, first, label)
    for candidate in candidates:
        trial = candidate(image)
        value = loss_of(net, trial, label)
        if value < lowest:
            image, lowest = trial, value
    return image


def reference_linf(net, x, label, eps, queries, noise):
    """Stripes, and patches in one colour (algorithm 2), pixel by pixel; only the random numbers are the package's."""
    channels, height, width = x.shape

    def end(c, i, j, sign):
        return min(max(float(x[c, i, j]) + sign * eps, 0.0), 1.0)

    stripes = noise.at("start").uniform(channels, 1, width)[0, :, 0].tolist()
    first = x.clone()
    for c in range(channels):
        for j in range(width):
            for i in range(height):
                first[c, i, j] = end(c, i, j, -1 if stripes[c][j] < 0.5 else 1)

    def candidate_of(query):
        def candidate(image):
            side = min(side_by_the_paper(query, queries, x), height, width)
            row, column, *colour = noise.at("query", query).uniform(2 + channels)[0].tolist()
            row, column = int(row * (height - side + 1)), int(column * (width - side + 1))
            sign = [-1 if u < 0.5 else 1 for u in colour]
            for orientation in (1, -1):
                trial = image.clone()
                for c in range(channels):
                    for i in range(row, row + side):
                        for j in range(column, column + side):
                            trial[c, i, j] = end(c, i, j, orientation * sign[c])
                if (trial - image).abs().max() > 1e-9:
                    return trial
            raise AssertionError("one of two opposite colours changes something")

        return candidate

    return reference_search(net, label, first, [candidate_of(query) for query in range(1, queries)])


@pytest.mark.parametrize("channels", [1, 3])
def test_linf_equals_algorithm_2(channels):
    net, x, y = make_problem(channels)
    eps = torch.tensor([0.05, 0.2, 0.1, 0.4], dtype=torch.float64)
    result = Square(queries=60)(net, x, y, goal=Misclassify(margin), threat=Linf(eps), seed=3, keep="last")
    for i in range(len(x)):
        image = reference_linf(net, x[i], int(y[i]), float(eps[i]), 60, Noise(3, torch.tensor([i])))
        torch.testing.assert_close(result.x_adv[i], image, rtol=0, atol=1e-12)


def eta_by_the_paper(height, width):
    """Equation 2, with indices from 1 as in the paper, for one half of a patch."""
    n = max(height // 2, width // 2)
    values = torch.zeros(height, width, dtype=torch.float64)
    for r in range(1, height + 1):
        for s in range(1, width + 1):
            most = n - max(abs(r - height // 2 - 1), abs(s - width // 2 - 1))
            values[r - 1, s - 1] = sum(1 / (n + 1 - k) ** 2 for k in range(most + 1))
    return values / values.square().sum().sqrt() if height else values


def reference_bump(side, *, transposed):
    upper, lower = eta_by_the_paper(side // 2, side), eta_by_the_paper(side - side // 2, side)
    bump = torch.cat([upper, -lower])
    bump = bump / bump.square().sum().sqrt()
    return bump.T if transposed else bump


def reference_l2(net, x, label, eps, queries, noise):
    """Tiles, and mass that moves between patches (algorithm 3), with slices; only the random numbers are the package's."""
    channels, height, width = x.shape
    tile = min(height, width) // 5
    rows, columns = height // tile, width // tile
    sign = noise.at("start", "sign").uniform(channels, rows * columns)[0]
    turn = noise.at("start", "turn").uniform(rows * columns)[0]
    delta = torch.zeros_like(x)
    for number in range(rows * columns):
        i = (height - rows * tile) // 2 + number // columns * tile
        j = (width - columns * tile) // 2 + number % columns * tile
        for c in range(channels):
            bump = reference_bump(tile, transposed=bool(turn[number] < 0.5))
            delta[c, i : i + tile, j : j + tile] = bump * (-1 if sign[c, number] < 0.5 else 1)
    first = (x + eps * delta / delta.square().sum().sqrt()).clamp(0, 1)

    def candidate_of(query):
        def candidate(image):
            side = max(3, side_by_the_paper(query, queries, x))
            side = min(side + (side % 2 == 0), height, width)
            r1, s1, r2, s2, transposed, *signs = noise.at("query", query).uniform(5 + channels)[0].tolist()
            r1, r2 = (int(u * (height - side + 1)) for u in (r1, r2))
            s1, s2 = (int(u * (width - side + 1)) for u in (s1, s2))
            nu, unused = image - x, eps**2 - float((image - x).square().sum())
            after = nu.clone()
            for c in range(channels):
                mask = torch.zeros(height, width, dtype=torch.bool)
                mask[r1 : r1 + side, s1 : s1 + side] = mask[r2 : r2 + side, s2 : s2 + side] = True
                old = nu[c, r1 : r1 + side, s1 : s1 + side]
                fresh = reference_bump(side, transposed=transposed < 0.5) * (-1 if signs[c] < 0.5 else 1)
                if old.abs().max() > 0:
                    fresh = fresh + old / old.square().sum().sqrt()
                available = math.sqrt(float(nu[c][mask].square().sum()) + max(0.0, unused) / channels)
                after[c, r2 : r2 + side, s2 : s2 + side] = 0
                after[c, r1 : r1 + side, s1 : s1 + side] = fresh / fresh.square().sum().sqrt() * available
            return (x + after).clamp(0, 1)

        return candidate

    return reference_search(net, label, first, [candidate_of(query) for query in range(1, queries)])


@pytest.mark.parametrize("channels", [1, 3])
def test_l2_equals_algorithm_3(channels):
    net, x, y = make_problem(channels)
    eps = torch.tensor([0.5, 2.0, 1.0, 1.5], dtype=torch.float64)
    result = Square(queries=50)(net, x, y, goal=Misclassify(margin), threat=L2(eps), seed=3, keep="last")
    for i in range(len(x)):
        image = reference_l2(net, x[i], int(y[i]), float(eps[i]), 50, Noise(3, torch.tensor([i])))
        # The unspent budget is the root of a difference of squares: where it is zero, a rounding error of about 2^-52 of
        # eps^2, which depends on the order of the sum and so on the processor, becomes 2^-26 of eps.
        torch.testing.assert_close(result.x_adv[i], image, rtol=0, atol=2**-25 * float(eps[i]))


@pytest.mark.parametrize("queries", [10_000, 1000, 300])
def test_the_schedule_is_that_of_the_paper(queries):
    attack = Square(queries=queries)
    for query in range(1, queries):
        assert attack.share(query) == p_by_the_paper(query, queries)
    shares = [Square(queries=10_000).share(query) for query in (10, 11, 50, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert shares == [0.8 / 2**k for k in (0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9)]


@pytest.mark.parametrize("min_side", [1, 3])
def test_patches_cover_their_share_of_an_image_of_any_shape(min_side):
    for share in (1.0, 0.8, 0.3, 0.05, 0.001):
        for size in (1, 3, 5, 28, 33):
            side = max(min_side, round(math.sqrt(share) * size))
            side += min_side > 1 and side % 2 == 0
            assert patch_shape(share, size, size, min_side) == (min(side, size), min(side, size))
        for height, width in ((1, 64), (2, 40), (5, 300), (1, 2)):
            high, wide = patch_shape(share, height, width, min_side)
            assert 1 <= high <= height
            assert 1 <= wide <= width
            assert patch_shape(share, width, height, min_side) == (wide, high)
            if high == height and wide > max(min_side, high):  # else a square, or the smallest patch
                assert abs(high * wide - share * height * width) <= max(high / 2, min_side * high)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 5, 9), (2, 1, 30)])
def test_linf_candidates_differ_in_one_patch_at_the_corners_of_the_ball(shape):
    """Every coordinate of a queried point lies at an end of ball and box; it differs from the start in one patch only."""
    net, x, eps = ConstantModel(), torch.rand(3, *shape), torch.tensor([0.1, 0.3, 0.05])
    Square(queries=80)(net, x, torch.zeros(3, dtype=torch.int64), threat=Linf(eps), keep="last")
    low, high = ((x + sign * eps.reshape(3, 1, 1, 1)).clamp(0, 1) for sign in (-1, 1))
    start = net.inputs[0]
    assert torch.equal(start == high, (start == high)[:, :, :1].expand_as(start)), "vertical stripes"
    for query, points in enumerate(net.inputs[:80]):
        distance = torch.minimum((points - low).abs(), (points - high).abs())
        assert float(distance.max()) < 1e-6
        if query:
            height, width = patch_shape(p_by_the_paper(query, 80), *shape[1:])
            for changed in (points != start).any(1):
                rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
                assert len(rows), "no query repeats the current image"
                assert int(rows.max() - rows.min()) < height
                assert int(columns.max() - columns.min()) < width


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 28, 28), (2, 5, 9), (2, 1, 30), (1, 2, 2), (2, 1, 1)])
def test_l2_candidates_spend_the_whole_budget(shape):
    net, x, eps = (
        ConstantModel(),
        torch.rand(3, *shape, dtype=torch.float64),
        torch.tensor([0.1, 0.3, 1.5], dtype=torch.float64),
    )
    Square(queries=60)(net, x, torch.zeros(3, dtype=torch.int64), threat=L2(eps, None), keep="last")
    for points in net.inputs:
        torch.testing.assert_close((points - x).flatten(1).norm(dim=1), eps, rtol=1e-9, atol=0)


def test_what_the_box_clamps_is_spent_in_the_next_patch():
    """On a black image half of the start is clamped; a patch of one sign spends it again."""
    net, x = ConstantModel(), torch.zeros(4, 1, 15, 15, dtype=torch.float64)
    Square(queries=40)(net, x, torch.zeros(4, dtype=torch.int64), threat=L2(1.0), keep="last")
    start = net.inputs[0].flatten(1).norm(dim=1)
    assert (start < 0.85).all()
    assert max(float(points.flatten(1).norm(dim=1).max()) for points in net.inputs) > float(start.max())


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 2.0)])
def test_on_a_linear_model_the_best_corner_is_found(bounds):
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 2)).double(), torch.rand(5, 2, 3, 4, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = ((net[1].weight[0] - net[1].weight[1]).detach() * (2 * y[:, None] - 1)).reshape(x.shape)
    result = Square(queries=600)(net, x, y, goal=Misclassify(margin), threat=Linf(0.2, bounds), keep="last")
    torch.testing.assert_close(result.x_adv, (x + 0.2 * slope.sign()).clamp(*bounds), rtol=0, atol=1e-12)


def test_on_a_linear_model_l2_is_close_to_the_optimum():
    """The best perturbation is along the weights and gains eps * |w|; random search gets most of that, and never more."""
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double(), torch.rand(5, 1, 6, 6, dtype=torch.float64)
    y = net(x).argmax(1)
    slope = (net[1].weight[0] - net[1].weight[1]).detach()
    result = Square(queries=400)(net, x, y, goal=Misclassify(margin), threat=L2(0.5, None), keep="last")
    gain = margin(net(result.x_adv), y) - margin(net(x), y)
    assert (gain <= 0.5 * slope.norm() + 1e-9).all()
    assert (gain >= 0.6 * 0.5 * slope.norm()).all()


@pytest.mark.parametrize(("threat", "queries"), [(Linf(0.1), 2), (L2(0.1), 15)])
@pytest.mark.parametrize("up", [True, False])
def test_both_ends_of_a_single_coordinate_are_tried(threat, queries, up):
    """In Linf at once; in L2 when the old and the new term cancel, which happens on every second query."""

    def net(x):
        lead = ((x - 0.55) if up else (0.45 - x)).flatten(1)
        return torch.cat([-lead, lead], 1)

    x = torch.full((20, 1, 1, 1), 0.5)
    one, more = (Square(queries=q)(net, x, torch.zeros(20, dtype=torch.int64), threat=threat) for q in (1, queries))
    assert 0 < one.success.sum() < 20
    assert more.success.all()
    alone = Square(queries=queries)(net, x[:1], torch.zeros(1, dtype=torch.int64), threat=threat)
    assert torch.equal(alone.x_adv, more.x_adv[:1])


@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.5)])
def test_rows_of_a_table_are_images_of_height_one(threat):
    torch.manual_seed(3)
    net, x = nn.Linear(9, 3).double(), torch.rand(5, 9, dtype=torch.float64)
    y, goal = net(x).argmax(1), Misclassify(margin)
    table = Square(queries=80)(net, x, y, goal=goal, threat=threat, keep="last")
    image = Square(queries=80)(
        nn.Sequential(nn.Flatten(), net), x.reshape(5, 1, 1, 9), y, goal=goal, threat=threat, keep="last"
    )
    assert torch.equal(table.x_adv, image.x_adv.flatten(1))
    assert (margin(net(table.x_adv), y) > margin(net(x), y)).all()


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.4)])
def test_a_failure_costs_all_queries_and_a_success_fewer(threat):
    inner, x, y = make_problem(3)
    net = Counter(inner)
    result = Square(queries=50)(net, x, y, goal=Misclassify(margin), threat=threat)
    assert int(result.forwards.sum()) == net.seen
    assert (result.forwards[~result.success] == 52).all()
    assert (result.forwards[result.success] < 52).all()
    assert 0 < result.success.sum() < len(x), result.success


def test_a_nan_loss_is_never_accepted():
    inner, x, y = make_problem(1)

    def partly_nan(points):
        return torch.where((points.flatten(1).sum(1) > x.flatten(1).sum(1)[:, None].max())[:, None], torch.nan, inner(points))

    class Never(Misclassify):
        def success(self, out, ref):
            return torch.zeros_like(ref, dtype=torch.bool)

    one, many = (Square(queries=q)(partly_nan, x, y, goal=Never(margin), threat=Linf(0.2), keep="last").x_adv for q in (1, 40))
    assert partly_nan(one).isnan().any()
    assert not partly_nan(many).isnan().any()


@pytest.mark.parametrize("fields", [{"queries": 0}, {"queries": 1.5}, {"p": 0.0}, {"p": 1.5}])
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        Square(**fields)


def test_unsupported_threats_are_refused():
    with pytest.raises(ArgumentError, match="it supports Linf, L2"):
        Square()(ConstantModel(), torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), threat=L1(1.0))
