"""Differential evolution alone: compared with its formulas in plain Python, on test functions, and with scipy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import differential_evolution
from scipy.stats import ks_2samp

from robustkit._engine.noise import Noise
from robustkit.attacks.pixels._differential_evolution import Population, Strategy, distinct_members, latin_hypercube

BEST, RAND = Strategy("best", (0.5, 1.0)), Strategy("rand", (0.5, 0.5))


def noise_of(m, seed=0):
    return Noise(seed, torch.arange(m))


def sphere(u):
    """On the unit cube, scaled by 10; the minimum, 0, is off its centre."""
    return (10 * (u - 0.37)).square().sum(-1)


def rastrigin(u):
    """The minimum, 0, is at 0.37; there is a local one near every integer distance from it."""
    z = 10 * (u - 0.37)
    return (z.square() - 10 * torch.cos(2 * math.pi * z) + 10).sum(-1)


def evolve(function, strategy, m, p, d, generations, seed=0):
    points = latin_hypercube(noise_of(m, seed).at("beginning"), p, d)
    population = Population.evaluated(points, function(points))
    for generation in range(generations):
        mutants = population.mutants(strategy, noise_of(m, seed).at(generation))
        population = population.select(mutants, function(mutants))
    return population


@pytest.mark.parametrize("strategy", [BEST, RAND])
def test_mutants_equal_the_formula(strategy):
    """One mutant after the other, in plain Python: Storn & Price, section 2, with scipy's dither and constraint."""
    m, p, d = 3, 6, 4
    noise = noise_of(m, 7)
    points = noise.at("points").uniform(p, d)
    values = noise.at("values").uniform(p)
    mutants = Population.evaluated(points, values).mutants(strategy, noise.at(0))
    members, redraws = distinct_members(noise.at(0, "others"), p), noise.at(0, "anew").uniform(p, d)
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
                assert float(mutants[i, j, k]) == pytest.approx(float(redraws[i, j, k]) if outside else value, abs=1e-6)
    assert 0 < redrawn < m * p * d


@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 2**32))
def test_distinct_members_differ_from_each_other_and_the_parent(m, p, seed):
    four = torch.stack([torch.arange(p).expand(m, p), *distinct_members(noise_of(m, seed), p)])
    assert ((four >= 0) & (four < p)).all()
    for a in range(4):
        for b in range(a):
            assert (four[a] != four[b]).all()


def test_all_triples_of_distinct_members_are_equally_likely():
    first, second, third = (member[:, 1] for member in distinct_members(noise_of(24_000), 5))
    counts = torch.bincount(first * 25 + second * 5 + third, minlength=125)
    counts = counts[counts > 0]
    assert len(counts) == 4 * 3 * 2
    assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 49.7  # chi-squared, 23 degrees of freedom, p = 0.001


@given(st.integers(1, 3), st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32))
def test_a_latin_hypercube_has_one_point_in_each_slice(m, p, d, seed):
    points = latin_hypercube(noise_of(m, seed), p, d)
    assert points.shape == (m, p, d)
    assert ((points >= 0) & (points < 1)).all()
    slices = (points.double() * p + 1e-5).floor().sort(1).values  # tolerates float32 rounding just below a slice
    assert torch.equal(slices, torch.arange(p).double().reshape(1, p, 1).expand(m, p, d))


def test_the_columns_of_a_latin_hypercube_are_uncorrelated():
    points = latin_hypercube(noise_of(400), 20, 2) - 0.5
    assert abs(float((points[:, :, 0] * points[:, :, 1]).mean()) * 12) < 0.05


def test_a_mutant_replaces_its_own_parent_if_it_is_no_worse():
    points, mutants = torch.zeros(1, 5, 2), torch.ones(1, 5, 2)
    old = torch.tensor([[1.0, 1.0, 1.0, math.nan, math.nan]])
    new = torch.tensor([[0.5, 1.0, 2.0, 3.0, math.nan]])
    after = Population.evaluated(points, old).select(mutants, new)
    assert after.points[0, :, 0].tolist() == [1, 1, 0, 1, 1]
    assert after.values[0].tolist() == [0.5, 1.0, 1.0, 3.0, math.inf]
    assert torch.equal(after.best, torch.ones(1, 2))


def test_a_nan_value_is_never_the_best():
    population = Population.evaluated(torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[math.nan, 2.0, -math.inf, 1.0]]))
    assert population.best.item() == 2
    population = Population.evaluated(torch.arange(4.0).reshape(1, 4, 1), torch.tensor([[math.nan, 2.0, math.inf, 1.0]]))
    assert population.best.item() == 3


def test_concentrated_points_have_converged_unless_on_a_plateau():
    points = torch.tensor([0.40, 0.45, 0.50, 0.45]).reshape(1, 4, 1).repeat(4, 1, 2)  # standard deviation 0.0354
    points[1, :, 1] *= 2
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(4, 1)
    values[2], values[3, 0] = 1.0, math.inf
    population = Population.evaluated(points, values)
    assert population.converged(0.04).tolist() == [True, False, False, True]
    assert population.converged(0.08).tolist() == [True, True, False, True]
    assert not population.converged(0.0).any()


def test_redrawn_coordinates_do_not_pile_up_at_the_ends():
    """With all members at the two ends, half of the mutants would lie outside: they are redrawn uniformly."""
    points = (noise_of(200).uniform(20, 2) < 0.5).float() * (1 - 2**-24)
    mutants = Population.evaluated(points, torch.zeros(200, 20)).mutants(RAND, noise_of(200).at(0))
    fresh = mutants[(mutants != 0) & (mutants < 0.99999) & ((mutants - 0.5).abs() > 1e-6)]
    assert len(fresh) > 1000
    assert torch.histc(fresh, 10, 0, 1).div(len(fresh)).sub(0.1).abs().max() < 0.02


def test_an_evolution_does_not_depend_on_the_batch():
    """Draws are keyed by id, so rows may be dropped at any time."""
    whole = evolve(rastrigin, BEST, 5, 12, 3, 4)
    points = latin_hypercube(noise_of(5)[3:4].at("beginning"), 12, 3)
    population = Population.evaluated(points, rastrigin(points))
    for generation in range(4):
        mutants = population.mutants(BEST, noise_of(5)[3:4].at(generation))
        population = population.select(mutants, rastrigin(mutants))
    assert torch.equal(population.points, whole.points[3:4])


@pytest.mark.parametrize(("strategy", "p", "generations"), [(BEST, 200, 60), (RAND, 40, 200)])
@pytest.mark.parametrize("function", [sphere, rastrigin])
def test_the_minimum_is_found(function, strategy, p, generations):
    """For 20 problems at once; Rastrigin's function has a thousand basins, so some may end in the second best."""
    population = evolve(function, strategy, 20, p, 3, generations)
    minima = population.values.amin(1)
    assert torch.equal(population.values, function(population.points))
    assert torch.equal(function(population.best), minima)
    assert (minima < 1e-3).float().mean() >= (1.0 if function is sphere else 0.8)
    assert minima.max() < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("function", [sphere, rastrigin])
@pytest.mark.parametrize(("strategy", "name", "mutation"), [(BEST, "best1bin", (0.5, 1)), (RAND, "rand1bin", 0.5)])
def test_the_results_are_distributed_like_those_of_scipy(function, strategy, name, mutation):
    """The best value after 15 generations has the same distribution over 250 runs."""
    p, d, runs = 20, 3, 250
    ours = evolve(function, strategy, runs, p, d, 15).values.amin(1).log10().numpy()
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
