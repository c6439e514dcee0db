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
from robustkit.attacks.pixels._pixel_attack import Canvas, bell
from robustkit.errors import ArgumentError, ShapeError
from robustkit.testing.nets import Counter
from robustkit.testing.strategies import hyperplanes

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 24, 4)).double().eval()
X = torch.rand(9, 3, 6, 8, dtype=torch.float64)
Y = NET(X).argmax(1)
RECIPES = ["scipy", "paper"]


def painted(x, point, low, high, count):
    """One image (C, H, W) and one point, pixel by pixel."""
    x, per = x.clone(), 2 + len(x)
    for k in range(count):
        pixel = point[k * per : (k + 1) * per]
        row, column = (min(int(u * size), size - 1) for u, size in zip(pixel[:2].tolist(), x.shape[1:], strict=True))
        x[:, row, column] = low + (high - low) * pixel[2:].to(x)
    return x


def beginning(recipe, noise, p, d, per):
    if recipe == "scipy":
        return latin_hypercube(noise, p, d)
    u = noise.uniform(p, d)
    ends = (0 - 128) / 127, (255 - 128) / 127
    colours = (128 + 127 * truncnorm.ppf(u.double().numpy(), *ends)) / 255
    return torch.where(torch.arange(d) % per >= 2, torch.tensor(colours).float(), u)


def by_hand(recipe, count, p, generations, low, high):
    """One image, one candidate at a time, nothing of problems in it; only the formulas of a child are the package's."""
    strategy = Strategy("best", (0.5, 1.0)) if recipe == "scipy" else Strategy("rand", (0.5, 0.5))
    last = []
    for i in range(len(X)):
        noise = Noise(3, torch.tensor([i]))

        def losses(points, i=i):
            images = torch.stack([painted(X[i], point, low, high, count) for point in points[0]])
            return -nn.functional.cross_entropy(NET(images), Y[i : i + 1].expand(p), reduction="none").unsqueeze(0)

        points = beginning(recipe, noise.at("beginning"), p, 5 * count, 5)
        population = Population.begun(points, losses(points))
        for generation in range(generations):
            children = population.children(strategy, noise.at("generation", generation))
            population = population.after(children, losses(children))
        last.append(painted(X[i], population.best[0], low, high, count))
    return torch.stack(last)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("batch", [2, 9, 1000])
def test_the_last_iterate_is_that_of_a_slow_evolution(recipe, count, batch):
    threat = Pixels(count, bounds=(-0.5, 1.5))
    attack = OnePixel(population=11, generations=5, recipe=recipe)
    result = attack(Target(NET, batch_size=batch), X, Y, threat=threat, seed=3, keep="last")
    assert torch.allclose(result.x_adv, by_hand(recipe, count, 11, 5, -0.5, 1.5), atol=1e-6)


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 5), st.sampled_from([(0.0, 1.0), (-0.5, 1.25)]))
def test_paint_puts_in_the_pixels_and_leaves_the_bits_of_the_others(seed, channels, count, bounds):
    noise = Noise(seed, torch.arange(6))
    x, points = noise.at("x").uniform(channels, 2, 3), noise.at("points").uniform(count * (2 + channels))
    canvas = Canvas(x, Pixels(count, bounds=bounds), count)
    images = canvas.paint(x, points)
    assert torch.equal(images != x, (images != x) & (Pixels(count).size(images, x) <= count).reshape(-1, 1, 1, 1))
    expected = torch.stack([painted(*pair, *bounds, count) for pair in zip(x, points, strict=True)])
    assert torch.allclose(images, expected, atol=1e-6)
    assert torch.equal(images == x, expected == x)


def test_the_last_of_two_pixels_at_one_place_is_painted():
    point = torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.2, 0.9, 0.9, 0.5, 0.5, 0.5, 0.15, 0.15, 0.7, 0.7, 0.7]])
    x = torch.zeros(1, 3, 2, 2)
    image = Canvas(x, Pixels(3), 3).paint(x, point)
    assert image[0, 0].tolist() == [[pytest.approx(0.7), 0], [0, 0.5]]


def test_ends_of_the_unit_cube_lie_in_the_image():
    x = torch.full((1, 1, 3, 5), 0.3)
    canvas = Canvas(x, Pixels(1, bounds=(0.1, 0.7)), 1)
    first, last = canvas.paint(x, torch.zeros(1, 3)), canvas.paint(x, torch.full((1, 3), 1 - 2**-24))
    assert first[0, 0, 0, 0] == pytest.approx(0.1)
    assert last[0, 0, 2, 4] == pytest.approx(0.7)
    assert last.max() <= 0.7


def test_first_colours_of_the_paper_are_the_normal_law_within_the_range():
    u = torch.linspace(0, 1 - 2**-24, 1001)
    law = truncnorm((0 - 128) / 127, (255 - 128) / 127, loc=128 / 255, scale=127 / 255)
    assert np.allclose(bell(u).numpy(), law.ppf(u.numpy().astype(float)), atol=1e-6)
    assert bell(u).min() == 0
    assert bell(u).max() < 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_pile_of_extreme_colours(recipe):
    """Every candidate that the model sees, beside those of a uniform law: the ends of the range are nothing special."""
    seen = []

    def watched(x):
        colours = x[(x != 0.5).any(1).unsqueeze(1).expand_as(x)]
        seen.append(colours.reshape(-1))
        return torch.stack([x.flatten(1).sum(1) * 0, x.flatten(1).sum(1) * 0 + 1], 1)

    x = torch.full((6, 3, 5, 5), 0.5)
    OnePixel(population=60, generations=6, recipe=recipe)(watched, x, torch.ones(6, dtype=torch.int64), threat=Pixels(1))
    colours = torch.cat(seen)
    assert len(colours) > 6 * 60 * 7 * 3 * 0.9
    for end in (colours < 0.01, colours > 0.99):
        assert end.float().mean() < 0.015
    assert ((colours > 0) & (colours < 1)).float().mean() > 0.999


@pytest.mark.parametrize("recipe", RECIPES)
@given(plane=hyperplanes(largest=2), count=st.sampled_from([1, 3]), seed=st.integers(0, 2**16), wanted=st.booleans())
def test_a_hyperplane_falls_where_its_best_pixels_reach_well_beyond_it(recipe, plane, count, seed, wanted):
    """Untargeted and targeted; where the closed form says that no pixels reach it, nothing is claimed."""
    threat = Pixels(count)
    goal = {"goal": ClassifyAs()} if wanted else {}
    ref = 1 - plane.y if wanted else plane.y
    attack = OnePixel(population=100, generations=40, recipe=recipe)
    result = attack(plane.net, plane.x, ref, threat=threat, seed=seed, **goal)
    share = plane.margin / plane.best_gain(threat)
    assert result.success[share < 0.6].all()
    assert not result.success[share > 1 + 1e-6].any()


@pytest.mark.parametrize("count", [1, 3, 5])
def test_as_many_pixels_as_the_threat_allows_unless_fewer_are_asked_for(count):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 48, 2)).double()
    y = flat(X).argmax(1)
    size = OnePixel(population=30, generations=3)(flat, X, y, threat=Pixels(count), keep="last").size
    assert (size <= count).all()
    assert size.max() == count
    assert OnePixel(pixels=1, population=4, generations=1)(flat, X, y, threat=Pixels(count), keep="last").size.eq(1).all()


def test_each_example_keeps_to_its_own_budget_whoever_is_beside_it():
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


class Bowl(nn.Module):
    """Right until the one pixel has moved so far from 0; sees how large its batches are."""

    def __init__(self, far):
        super().__init__()
        self.far, self.batch_size = far, 0

    def forward(self, x):
        self.batch_size = max(self.batch_size, len(x))
        gain = x.flatten(1).sum(1)
        return torch.stack([torch.full_like(gain, self.far), gain], 1)


@pytest.mark.parametrize(("batch", "largest"), [(1, 1), (7, 5), (40, 40), (300, 150)])
def test_an_image_that_does_not_fall_costs_the_whole_evolution_and_no_batch_is_too_large(batch, largest):
    x, y = torch.zeros(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    net = Bowl(2.0)
    counter = Counter(net)
    result = OnePixel(population=30, generations=4)(Target(counter, batch_size=batch), x, y, threat=Pixels(1))
    assert not result.success.any()
    assert result.forwards.tolist() == [1 + 30 * 5 + 1] * 5  # looked at first, evolved, judged
    assert net.batch_size == largest
    assert counter.seen == 5 * 152


def test_a_solved_image_leaves_in_the_middle_of_a_generation():
    x, y = torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    half = Bowl(torch.tensor(0.5))
    result = OnePixel(population=400)(Target(half, batch_size=8), x, y, threat=Pixels(1))
    assert result.success.all()
    # Half of the candidates succeed. While all are asked they are asked one at a time, then two, ... eight.
    assert result.forwards.max() <= 2 + 40
    assert result.forwards.float().mean() < 2 + 8
    assert (result.x_adv.flatten(1).amax(1) > 0.5).all()


def test_the_first_candidate_that_succeeds_comes_back_whatever_the_batch():
    x, y = torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64)
    one, all_at_once = (
        OnePixel(population=40)(Target(Bowl(0.8), batch_size=batch), x, y, threat=Pixels(1)).x_adv for batch in (1, 500)
    )
    assert torch.equal(one, all_at_once)
    points = latin_hypercube(Noise(0, torch.arange(8)).at("beginning"), 40, 3)
    for i in range(8):
        first = next((u for u in points[i, :, 2].tolist() if u > 0.8), None)
        assert float(one[i].max()) == pytest.approx(first)


def test_a_population_larger_than_there_is_room_for_goes_image_by_image():
    attack = OnePixel(population=1100, generations=1)
    few, many = (attack(Target(NET, batch_size=batch), X, Y, threat=Pixels(1), keep="last").x_adv for batch in (2, 64))
    assert torch.allclose(few, many, rtol=0, atol=1e-12)


def test_an_evolution_that_has_come_to_rest_leaves_with_its_best():
    """On a bowl all candidates run together; on flat ground they never do, so that every generation is tried."""

    class Low(nn.Module):
        def forward(self, x):
            score = -(x[:, 0, 1, 2] - 0.6).square() * 50
            return torch.stack([torch.ones_like(score), score], 1)

    x, wanted = torch.zeros(3, 1, 3, 3), torch.ones(3, dtype=torch.int64)
    free, never = (
        OnePixel(population=30, generations=60, tolerance=tolerance)(Low(), x, wanted, goal=ClassifyAs(), threat=Pixels(1))
        for tolerance in (0.05, 0.0)
    )
    assert (never.forwards >= 30 * 61).all()
    assert (free.forwards < 30 * 40).all()
    assert (free.forwards > 30 * 10).all()
    assert len(free.forwards.unique()) > 1  # each by itself
    for result in (free, never):
        assert not result.success.any()
        assert torch.allclose(result.x_adv[:, 0, 1, 2], torch.tensor(0.6), atol=0.05)

    flat = OnePixel(population=30, generations=60)(
        lambda x: torch.eye(2)[:1].expand(len(x), 2), x, 0 * wanted, threat=Pixels(1)
    )
    assert (flat.forwards >= 30 * 61).all()


def test_examples_that_are_wrong_anyway_are_left_alone():
    """All of a budget among them, so that there is nothing to do for it."""
    wrong = torch.arange(9) % 2 == 0
    eps = torch.where(wrong, 1.0, 2.0)
    result = OnePixel(population=5, generations=2)(NET, X, torch.where(wrong, (Y + 1) % 4, Y), threat=Pixels(eps))
    assert torch.equal(result.x_adv[wrong], X[wrong])
    assert (result.forwards[wrong] == 1).all()
    assert (result.size[~wrong] > 0).all()


def test_losses_that_are_no_numbers_are_the_worst():
    """The further from the wanted class, the closer to where the net breaks down: the evolution must keep off it."""

    class Broken(nn.Module):
        def forward(self, x):
            gain = x.flatten(1).sum(1)
            gain = torch.where(gain > 0.5, torch.nan, gain)
            return torch.stack([torch.ones_like(gain), gain], 1)

    x, wanted = torch.zeros(4, 1, 3, 3), torch.ones(4, dtype=torch.int64)
    result = OnePixel(population=20, generations=15)(Broken(), x, wanted, goal=ClassifyAs(), threat=Pixels(1), keep="last")
    reached = result.x_adv.flatten(1).sum(1)
    assert ((reached > 0.45) & (reached <= 0.5)).all()


def test_scipy_comes_as_far_on_the_same_images():
    """Best1bin, Latin hypercube, deferred, the same budget, no stop: the losses of the best candidates, image by image."""
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
                torch.stack([painted(x[i], point, 0, 1, 1) for point in torch.tensor(u.T)]), y[i : i + 1].expand(u.shape[1])
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
def test_senseless_fields_are_refused(fields):
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        OnePixel(**fields)


def test_what_cannot_be_attacked_is_refused():
    with pytest.raises(ArgumentError, match="serves Pixels"):
        OnePixel()(NET, X, Y, threat=Linf(0.1))
    with pytest.raises(ArgumentError, match=r"pixels=3 .* allows, which is 2; leave pixels out"):
        OnePixel(pixels=3)(NET, X, Y, threat=Pixels(torch.tensor([1.0, 2.0])[torch.arange(9) % 2]))
    for attack in (OnePixel(population=4, generations=1), PixelSearch(), SparseRS()):
        with pytest.raises(ArgumentError, match=r"pixels=48 must be below 48, the number of locations"):
            attack(NET, X, Y, threat=Pixels(48))
    with pytest.raises(ShapeError, match="N, C, H, W"):
        OnePixel()(nn.Linear(3, 2), torch.rand(2, 3), torch.zeros(2, dtype=torch.int64), threat=Pixels(1))
