"""Differential evolution by itself: against a slow writing of the formulas, on standard functions, and beside scipy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import differential_evolution
from scipy.stats import ks_2samp

from robustkit._engine.noise import Noise
from robustkit.attacks.pixels._differential_evolution import Population, Strategy, latin_hypercube, others

BEST, RAND = Strategy("best", (0.5, 1.0)), Strategy("rand", (0.5, 0.5))


def noise_of(m, seed=0):
    return Noise(seed, torch.arange(m))


def sphere(u):
    """Unit cube to [-5, 5]; the minimum, 0, lies away from the middle of the cube."""
    return (10 * (u - 0.37)).square().sum(-1)


def rastrigin(u):
    """Minimum 0 at 0.37, and a local one around every whole number."""
    z = 10 * (u - 0.37)
    return (z.square() - 10 * torch.cos(2 * math.pi * z) + 10).sum(-1)


def evolved(function, strategy, m, p, d, generations, seed=0):
    points = latin_hypercube(noise_of(m, seed).at("beginning"), p, d)
    population = Population.begun(points, function(points))
    for generation in range(generations):
        children = population.children(strategy, noise_of(m, seed).at(generation))
        population = population.after(children, function(children))
    return population


@pytest.mark.parametrize("strategy", [BEST, RAND])
def test_children_are_those_of_the_formula(strategy):
    """One child after the other, in plain numbers: Storn & Price, section 2, and scipy's dither and constraint."""
    m, p, d = 3, 6, 4
    noise = noise_of(m, 7)
    points = noise.at("points").uniform(p, d)
    values = noise.at("values").uniform(p)
    children = Population.begun(points, values).children(strategy, noise.at(0))
    members, anew = others(noise.at(0, "others"), p), noise.at(0, "anew").uniform(p, d)
    redrawn = 0
    for i in range(m):
        scale = 0.5
        if strategy is BEST:
            scale = 0.5 + 0.5 * float(noise.at(0, "dither").uniform(1, 1)[i])
        for j in range(p):
            a, b, c = (points[i, member[i, j]].tolist() for member in members)
            base = c if strategy is RAND else points[i, min(range(p), key=values[i].tolist().__getitem__)].tolist()
            for k in range(d):
                value = base[k] + scale * (a[k] - b[k])
                outside = not 0 <= value < 1
                redrawn += outside
                assert float(children[i, j, k]) == pytest.approx(float(anew[i, j, k]) if outside else value, abs=1e-6)
    assert 0 < redrawn < m * p * d


@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**32))
def test_the_others_are_three_different_members_and_never_the_parent(m, p, seed):
    four = torch.stack([torch.arange(p).expand(m, p), *others(noise_of(m, seed), p)])
    assert ((four >= 0) & (four < p)).all()
    for a in range(4):
        for b in range(a):
            assert (four[a] != four[b]).all()


def test_every_triple_of_others_is_as_likely():
    first, second, third = (member[:, 1] for member in others(noise_of(24_000), 5))
    counts = torch.bincount(first * 25 + second * 5 + third, minlength=125)
    counts = counts[counts > 0]
    assert len(counts) == 4 * 3 * 2
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 49.7  # chi-squared, 23 degrees of freedom, p = 0.001


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32))
def test_a_latin_hypercube_has_one_point_in_each_slice(m, p, d, seed):
    points = latin_hypercube(noise_of(m, seed), p, d)
    assert points.shape == (m, p, d)
    assert ((points >= 0) & (points < 1)).all()
    slices = (points.double() * p + 1e-5).floor().sort(1).values  # a float32 rounding below the slice counts as in it
    assert torch.equal(slices, torch.arange(p).double().reshape(1, p, 1).expand(m, p, d))


def test_the_columns_of_a_latin_hypercube_are_not_tied_together():
    points = latin_hypercube(noise_of(400), 20, 2) - 0.5
    assert abs(float((points[:, :, 0] * points[:, :, 1]).mean()) * 12) < 0.05


def test_a_child_takes_the_place_of_its_own_parent_where_it_is_no_worse():
    points, children = torch.zeros(1, 5, 2), torch.ones(1, 5, 2)
    old = torch.tensor([[1.0, 1.0, 1.0, math.nan, math.nan]])
    new = torch.tensor([[0.5, 1.0, 2.0, 3.0, math.nan]])
    after = Population.begun(points, old).after(children, new)
    assert after.points[0, :, 0].tolist() == [1, 1, 0, 1, 1]
    assert after.values[0].tolist() == [0.5, 1.0, 1.0, 3.0, math.inf]
    assert torch.equal(after.best, torch.ones(1, 2))


def test_a_value_that_is_no_number_is_never_the_best():
    population = Population.begun(torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[math.nan, 2.0, -math.inf, 1.0]]))
    assert population.best.item() == 2
    population = Population.begun(torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[math.nan, 2.0, math.inf, 1.0]]))
    assert population.best.item() == 3


def test_points_that_have_run_together_are_at_rest_but_not_on_flat_ground():
    near = torch.tensor([0.40, 0.45, 0.50, 0.45]).reshape(1, 4, 1).repeat(4, 1, 2)  # standard deviation 0.0354
    near[1, :, 1] *= 2
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(4, 1)
    values[2], values[3, 0] = 1.0, math.inf
    population = Population.begun(near, values)
    assert population.at_rest(0.04).tolist() == [True, False, False, True]
    assert population.at_rest(0.08).tolist() == [True, True, False, True]
    assert not population.at_rest(0.0).any()


def test_coordinates_that_leave_the_range_do_not_pile_up_at_its_ends():
    """All members at the two ends: half of the children would lie outside. What comes back is uniform, and never an end."""
    points = (noise_of(200).uniform(20, 2) < 0.5).float() * (1 - 2**-24)
    children = Population.begun(points, torch.zeros(200, 20)).children(RAND, noise_of(200).at(0))
    fresh = children[(children != 0) & (children < 0.99999) & ((children - 0.5).abs() > 1e-6)]
    assert len(fresh) > 1000
    assert torch.histc(fresh, 10, 0, 1).div(len(fresh)).sub(0.1).abs().max() < 0.02


def test_a_problem_evolves_alone_as_it_does_among_others():
    """Its draws belong to its id, so rows may leave at any time."""
    whole = evolved(rastrigin, BEST, 5, 12, 3, 4)
    points = latin_hypercube(noise_of(5)[3:4].at("beginning"), 12, 3)
    population = Population.begun(points, rastrigin(points))
    for generation in range(4):
        children = population.children(BEST, noise_of(5)[3:4].at(generation))
        population = population.after(children, rastrigin(children))
    assert torch.equal(population.points, whole.points[3:4])


@pytest.mark.parametrize(("strategy", "p", "generations"), [(BEST, 200, 60), (RAND, 40, 200)])
@pytest.mark.parametrize("function", [sphere, rastrigin])
def test_the_minimum_is_found(function, strategy, p, generations):
    """Of 20 problems at once; Rastrigin's function has a thousand basins, of which some may end in the second best."""
    population = evolved(function, strategy, 20, p, 3, generations)
    found = population.values.amin(1)
    assert torch.equal(population.values, function(population.points))
    assert torch.equal(function(population.best), found)
    assert (found < 1e-3).float().mean() >= (1.0 if function is sphere else 0.8)
    assert found.max() < 1.0


@pytest.mark.parametrize("function", [sphere, rastrigin])
@pytest.mark.parametrize(("strategy", "name", "mutation"), [(BEST, "best1bin", (0.5, 1)), (RAND, "rand1bin", 0.5)])
def test_scipy_comes_as_far_in_as_many_generations(function, strategy, name, mutation):
    """The best value after 15 generations has the same law over 250 runs."""
    p, d, runs = 20, 3, 250
    ours = evolved(function, strategy, runs, p, d, 15).values.amin(1).log10().numpy()
    theirs = [
        differential_evolution(
            lambda u: function(torch.tensor(u.T)).numpy(),
            [(0, 1)] * d,
            strategy=name,
            mutation=mutation,
            recombination=1,
            popsize=-(-p // d),
            maxiter=15,
            init=np.random.default_rng(seed).permuted(
                (np.arange(p)[:, None] + np.random.default_rng(1000 + seed).random((p, d))) / p, axis=0
            ),
            tol=0,
            atol=-1,
            polish=False,
            updating="deferred",
            vectorized=True,
            rng=seed,
        ).fun
        for seed in range(runs)
    ]
    assert ks_2samp(ours, np.log10(theirs)).pvalue > 0.001
