import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import differential_evolution
from scipy.stats import truncnorm, wilcoxon
from torch import nn

from robustkit import ClassifyAs, Linf, OnePixel, Pixels, Target
from robustkit._engine.noise import Noise
from robustkit.attacks import PixelSearch, SparseRS
from robustkit.attacks.pixels._differential_evolution import Population, Strategy, latin_hypercube
from robustkit.attacks.pixels._pixel_attack import PixelEncoding, normal_colours
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing.nets import Counter
from robustkit.testing.strategies import hyperplanes

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 24, 4)).double().eval()
X = torch.rand(9, 3, 6, 8, dtype=torch.float64)
Y = NET(X).argmax(1)
RECIPES = ["scipy", "paper"]


def paint_point(x, point, low, high, count):
    """One image (C, H, W) with the pixels of one point, pixel by pixel."""
    x, dims = x.clone(), 2 + len(x)
    for k in range(count):
        pixel = point[k * dims : (k + 1) * dims]
        row, column = (min(int(u * size), size - 1) for u, size in zip(pixel[:2].tolist(), x.shape[1:], strict=True))
        x[:, row, column] = low + (high - low) * pixel[2:].to(x)
    return x


def initial_points(recipe, noise, p, d, dims):
    if recipe == "scipy":
        return latin_hypercube(noise, p, d)
    u = noise.uniform(p, d)
    ends = (0 - 128) / 127, (255 - 128) / 127
    colours = (128 + 127 * truncnorm.ppf(u.double().numpy(), *ends)) / 255
    return torch.where(torch.arange(d) % dims >= 2, torch.tensor(colours).float(), u)


def reference_one_pixel(recipe, count, p, generations, low, high):
    """One image and one candidate at a time; only the formulas of differential evolution are the package's."""
    strategy = Strategy("best", (0.5, 1.0)) if recipe == "scipy" else Strategy("rand", (0.5, 0.5))
    images_last = []
    for i in range(len(X)):
        noise = Noise(3, torch.tensor([i]))

        def losses(points, i=i):
            images = torch.stack([paint_point(X[i], point, low, high, count) for point in points[0]])
            return -nn.functional.cross_entropy(NET(images), Y[i : i + 1].expand(p), reduction="none").unsqueeze(0)

        points = initial_points(recipe, noise.at("beginning"), p, 5 * count, 5)
        population = Population.evaluated(points, losses(points))
        for generation in range(generations):
            mutants = population.mutants(strategy, noise.at("generation", generation))
            population = population.select(mutants, losses(mutants))
        images_last.append(paint_point(X[i], population.best[0], low, high, count))
    return torch.stack(images_last)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("batch", [2, 9, 1000])
def test_the_last_iterate_equals_that_of_an_independent_loop(recipe, count, batch):
    threat = Pixels(count, bounds=(-0.5, 1.5))
    attack = OnePixel(population=11, generations=5, recipe=recipe)
    result = attack(Target(NET, batch_size=batch), X, Y, threat=threat, seed=3, keep="last")
    assert torch.allclose(result.x_adv, reference_one_pixel(recipe, count, 11, 5, -0.5, 1.5), atol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 5), st.sampled_from([(0.0, 1.0), (-0.5, 1.25)]))
def test_paint_changes_the_pixels_and_keeps_the_bits_of_the_others(seed, channels, count, bounds):
    noise = Noise(seed, torch.arange(6))
    x, points = noise.at("x").uniform(channels, 2, 3), noise.at("points").uniform(count * (2 + channels))
    encoding = PixelEncoding(x, Pixels(count, bounds=bounds), count)
    images = encoding.paint(x, points)
    assert torch.equal(images != x, (images != x) & (Pixels(count).size(images, x) <= count).reshape(-1, 1, 1, 1))
    expected = torch.stack([paint_point(*pair, *bounds, count) for pair in zip(x, points, strict=True)])
    assert torch.allclose(images, expected, atol=1e-6)
    assert torch.equal(images == x, expected == x)


def test_the_last_of_two_pixels_at_one_location_is_painted():
    point = torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.2, 0.9, 0.9, 0.5, 0.5, 0.5, 0.15, 0.15, 0.7, 0.7, 0.7]])
    x = torch.zeros(1, 3, 2, 2)
    image = PixelEncoding(x, Pixels(3), 3).paint(x, point)
    assert image[0, 0].tolist() == [[pytest.approx(0.7), 0], [0, 0.5]]


def test_ends_of_the_unit_cube_lie_in_the_image():
    x = torch.full((1, 1, 3, 5), 0.3)
    encoding = PixelEncoding(x, Pixels(1, bounds=(0.1, 0.7)), 1)
    first, last = encoding.paint(x, torch.zeros(1, 3)), encoding.paint(x, torch.full((1, 3), 1 - 2**-24))
    assert first[0, 0, 0, 0] == pytest.approx(0.1)
    assert last[0, 0, 2, 4] == pytest.approx(0.7)
    assert last.max() <= 0.7


def test_initial_colours_of_the_paper_are_truncated_normal():
    u = torch.linspace(0, 1 - 2**-24, 1001)
    distribution = truncnorm((0 - 128) / 127, (255 - 128) / 127, loc=128 / 255, scale=127 / 255)
    assert np.allclose(normal_colours(u).numpy(), distribution.ppf(u.numpy().astype(float)), atol=1e-6)
    assert normal_colours(u).min() == 0
    assert normal_colours(u).max() < 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_extreme_colours_are_not_overrepresented(recipe):
    """Over all queried candidates, the ends of the range are no more frequent than under a uniform distribution."""
    queried = []

    def recorded(x):
        colours = x[(x != 0.5).any(1).unsqueeze(1).expand_as(x)]
        queried.append(colours.reshape(-1))
        return torch.stack([x.flatten(1).sum(1) * 0, x.flatten(1).sum(1) * 0 + 1], 1)

    x = torch.full((6, 3, 5, 5), 0.5)
    OnePixel(population=60, generations=6, recipe=recipe)(recorded, x, torch.ones(6, dtype=torch.int64), threat=Pixels(1))
    colours = torch.cat(queried)
    assert len(colours) > 6 * 60 * 7 * 3 * 0.9
    for end in (colours < 0.01, colours > 0.99):
        assert end.float().mean() < 0.015
    assert ((colours > 0) & (colours < 1)).float().mean() > 0.999


@pytest.mark.parametrize("recipe", RECIPES)
@given(plane=hyperplanes(largest=2), count=st.sampled_from([1, 3]), seed=st.integers(0, 2**16), targeted=st.booleans())
def test_a_hyperplane_is_crossed_where_the_best_pixels_go_well_beyond_it(recipe, plane, count, seed, targeted):
    """Untargeted and targeted; where the closed form says that no pixels reach it, there is no success."""
    threat = Pixels(count)
    goal = {"goal": ClassifyAs()} if targeted else {}
    ref = 1 - plane.y if targeted else plane.y
    attack = OnePixel(population=100, generations=40, recipe=recipe)
    result = attack(plane.net, plane.x, ref, threat=threat, seed=seed, **goal)
    share = plane.margin / plane.best_gain(threat)
    assert result.success[share < 0.6].all()
    assert not result.success[share > 1 + 1e-6].any()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_the_threat_limits_the_pixels_unless_fewer_are_requested(count):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48, 2)).double()
    y = flat(X).argmax(1)
    size = OnePixel(population=30, generations=3)(flat, X, y, threat=Pixels(count), keep="last").size
    assert (size <= count).all()
    assert size.max() == count
    assert OnePixel(pixels=1, population=4, generations=1)(flat, X, y, threat=Pixels(count), keep="last").size.eq(1).all()


def test_each_example_keeps_to_its_own_budget_in_any_batch():
    eps = torch.tensor([1.0, 3.0, 2.5, 1.0, 5.0, 0.5, 3.0, 2.0, 1.0])
    attack = OnePixel(population=12, generations=3)
    whole = attack(NET, X, Y, threat=Pixels(eps), keep="last")
    assert (whole.size <= eps.floor()).all()
    assert torch.equal(whole.x_adv[5], X[5])
    for i in (0, 2, 4):
        alone = attack(
            NET, X[i : i + 1], Y[i : i + 1], threat=Pixels(float(eps[i].floor())), ids=torch.tensor([i]), keep="last"
        )
        assert torch.allclose(alone.x_adv[0], whole.x_adv[i], rtol=0, atol=1e-12)
    two = OnePixel(pixels=2, population=12, generations=3)(NET, X, Y, threat=Pixels(eps), keep="last")
    assert (two.size <= eps.floor().clamp(max=2)).all()


class SumThreshold(nn.Module):
    """Correct until the sum of the pixels exceeds a threshold; records its largest batch."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold, self.batch_size = threshold, 0

    def forward(self, x):
        self.batch_size = max(self.batch_size, len(x))
        gain = x.flatten(1).sum(1)
        return torch.stack([torch.full_like(gain, self.threshold), gain], 1)


@pytest.mark.parametrize(("batch", "largest"), [(1, 1), (7, 5), (40, 40), (300, 150)])
def test_an_unsolved_image_costs_the_whole_evolution_and_no_batch_is_too_large(batch, largest):
    x, y = torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    net = SumThreshold(2.0)
    counter = Counter(net)
    result = OnePixel(population=30, generations=4)(Target(counter, batch_size=batch), x, y, threat=Pixels(1))
    assert not result.success.any()
    assert result.forwards.tolist() == [1 + 30 * 5 + 1] * 5  # clean query, evolution, evaluation
    assert net.batch_size == largest
    assert counter.seen == 5 * 152


def test_a_solved_image_leaves_within_a_generation():
    x, y = torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    half = SumThreshold(torch.tensor(0.5))
    result = OnePixel(population=400)(Target(half, batch_size=8), x, y, threat=Pixels(1))
    assert result.success.all()
    # Half of the candidates succeed. A query holds one candidate of each of eight images, then two of each of four, ...
    assert result.forwards.max() <= 2 + 40
    assert result.forwards.float().mean() < 2 + 8
    assert (result.x_adv.flatten(1).amax(1) > 0.5).all()


def test_the_first_successful_candidate_is_returned_for_any_batch_size():
    x, y = torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    one, all_at_once = (
        OnePixel(population=40)(Target(SumThreshold(0.8), batch_size=batch), x, y, threat=Pixels(1)).x_adv for batch in (1, 500)
    )
    assert torch.equal(one, all_at_once)
    points = latin_hypercube(Noise(0, torch.arange(8)).at("beginning"), 40, 3)
    for i in range(8):
        first = next((u for u in points[i, :, 2].tolist() if u > 0.8), None)
        assert float(one[i].max()) == pytest.approx(first)


@pytest.mark.slow
def test_a_population_above_the_memory_limit_runs_image_by_image():
    attack = OnePixel(population=1100, generations=1)
    few, many = (attack(Target(NET, batch_size=batch), X, Y, threat=Pixels(1), keep="last").x_adv for batch in (2, 64))
    assert torch.allclose(few, many, rtol=0, atol=1e-12)


def test_a_converged_evolution_returns_its_best_candidate():
    """In a quadratic bowl all candidates converge; on a plateau they never do, so all generations run."""

    class Bowl(nn.Module):
        def forward(self, x):
            score = -(x[:, 0, 1, 2] - 0.6).square() * 50
            return torch.stack([torch.ones_like(score), score], 1)

    x, target = torch.zeros(3, 1, 3, 3), torch.ones(3, dtype=torch.int64)
    stopped, complete = (
        OnePixel(population=30, generations=60, tolerance=tolerance)(Bowl(), x, target, goal=ClassifyAs(), threat=Pixels(1))
        for tolerance in (0.05, 0.0)
    )
    assert (complete.forwards >= 30 * 61).all()
    assert (stopped.forwards < 30 * 40).all()
    assert (stopped.forwards > 30 * 10).all()
    assert len(stopped.forwards.unique()) > 1  # each image by itself
    for result in (stopped, complete):
        assert not result.success.any()
        assert torch.allclose(result.x_adv[:, 0, 1, 2], torch.tensor(0.6), atol=0.05)

    flat = OnePixel(population=30, generations=60)(
        lambda x: torch.eye(2)[:1].expand(len(x), 2), x, 0 * target, threat=Pixels(1)
    )
    assert (flat.forwards >= 30 * 61).all()


def test_misclassified_examples_are_skipped():
    """They include all examples of one budget, so one search has nothing to do."""
    wrong = torch.arange(9) % 2 == 0
    eps = torch.where(wrong, 1.0, 2.0)
    result = OnePixel(population=5, generations=2)(NET, X, torch.where(wrong, (Y + 1) % 4, Y), threat=Pixels(eps))
    assert torch.equal(result.x_adv[wrong], X[wrong])
    assert (result.forwards[wrong] == 1).all()
    assert (result.size[~wrong] > 0).all()


def test_nan_losses_are_the_worst():
    """The loss falls towards a region where the output is NaN, which the evolution must avoid."""

    class Broken(nn.Module):
        def forward(self, x):
            gain = x.flatten(1).sum(1)
            gain = torch.where(gain > 0.5, torch.nan, gain)
            return torch.stack([torch.ones_like(gain), gain], 1)

    x, target = torch.zeros(4, 1, 3, 3), torch.ones(4, dtype=torch.int64)
    result = OnePixel(population=20, generations=15)(Broken(), x, target, goal=ClassifyAs(), threat=Pixels(1), keep="last")
    reached = result.x_adv.flatten(1).sum(1)
    assert ((reached > 0.45) & (reached <= 0.5)).all()


def test_the_losses_are_distributed_like_those_of_scipy():
    """Best1bin, Latin hypercube, deferred, the same budget, no early stop: the best losses, paired by image."""
    n, p, generations = 60, 20, 8
    noise = Noise(5, torch.arange(n))
    x = noise.uniform(3, 6, 8).double()
    y = NET(x).argmax(1)

    def loss(images, label):
        return -nn.functional.cross_entropy(NET(images), label, reduction="none").detach()

    ours = loss(OnePixel(population=p, generations=generations).perturb(NET, x, y, threat=Pixels(1)), y)
    theirs = [
        differential_evolution(
            lambda u, i=i: loss(
                torch.stack([paint_point(x[i], point, 0, 1, 1) for point in torch.tensor(u.T)]), y[i : i + 1].expand(u.shape[1])
            ).numpy(),
            [(0, 1)] * 5,
            strategy="best1bin",
            mutation=(0.5, 1),
            recombination=1,
            popsize=p // 5,
            maxiter=generations,
            init="latinhypercube",
            tol=0,
            atol=-1,
            polish=False,
            updating="deferred",
            vectorized=True,
            rng=i,
        ).fun
        for i in range(n)
    ]
    assert wilcoxon(ours.numpy(), np.array(theirs)).pvalue > 0.01
    at_random = loss(Pixels(1).sample(x, noise.at("random")), y)
    assert wilcoxon(at_random.numpy(), np.array(theirs)).pvalue < 1e-6  # so that the comparison can fail


@pytest.mark.parametrize(
    "fields",
    [
        {"pixels": 0},
        {"pixels": 1.5},
        {"population": 3},
        {"generations": 0},
        {"generations": True},
        {"recipe": "cmaes"},
        {"tolerance": -0.1},
    ],
)
def test_invalid_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        OnePixel(**fields)


def test_unsupported_threats_and_data_are_refused():
    with pytest.raises(ArgumentError, match="it supports Pixels"):
        OnePixel()(NET, X, Y, threat=Linf(0.1))
    with pytest.raises(ArgumentError, match=r"pixels=3 .* allows, which is 2; leave pixels out"):
        OnePixel(pixels=3)(NET, X, Y, threat=Pixels(torch.tensor([1.0, 2.0])[torch.arange(9) % 2]))
    for attack in (OnePixel(population=4, generations=1), PixelSearch(), SparseRS()):
        with pytest.raises(ArgumentError, match=r"pixels=48 must be below 48, the number of locations"):
            attack(NET, X, Y, threat=Pixels(48))
    with pytest.raises(ShapeError, match="N, C, H, W"):
        OnePixel()(nn.Linear(3, 2), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), threat=Pixels(1))
