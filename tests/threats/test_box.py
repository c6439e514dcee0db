"""The closed forms against general solvers of scipy."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit.threats._box import l1_nearest, l1_steepest, l2_steepest

SEEDS = st.integers(0, 2**32 - 1)


def problem(seed, width):
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=width).clip(0) * 10 ** generator.uniform(-3, 3)
    room = generator.choice([0.0, 1.0, generator.uniform()], width) * generator.uniform(0, 1, width)
    return weight, room, generator.uniform(0.01, 1.5) * max(room.sum(), 0.1)


def row(array):
    return torch.tensor(array, dtype=torch.float64).reshape(1, -1)


@given(SEEDS, st.integers(1, 12))
def test_l1_steepest_solves_the_linear_program(seed, width):
    weight, room, eps = problem(seed, width)
    z = l1_steepest(row(weight), row(room), row(eps))[0].numpy()
    best = scipy.optimize.linprog(-weight, A_ub=np.ones((1, width)), b_ub=[eps], bounds=[(0, r) for r in room])
    assert (z >= 0).all()
    assert (z <= room).all()
    assert z.sum() <= eps * (1 + 1e-12)
    assert weight @ z == pytest.approx(-best.fun, rel=1e-7, abs=1e-12)


@given(SEEDS, st.integers(1, 12))
def test_l1_nearest_agrees_with_a_root_finder_for_the_threshold(seed, width):
    size, room, eps = problem(seed, width)
    z = l1_nearest(row(size), row(room), row(eps))[0].numpy()

    def excess(threshold):
        return np.minimum((size - threshold).clip(0), room).sum() - eps

    threshold = scipy.optimize.brentq(excess, 0, size.max() + 1, xtol=1e-14) if excess(0) > 0 else 0.0
    np.testing.assert_allclose(z, np.minimum((size - threshold).clip(0), room), atol=1e-9 * (1 + size.max()))


@given(SEEDS, st.integers(1, 5))
def test_l1_nearest_is_nearest_among_random_feasible_points(seed, width):
    size, room, eps = problem(seed, width)
    z = l1_nearest(row(size), row(room), row(eps))[0].numpy()
    generator = np.random.default_rng(seed + 1)
    others = generator.uniform(0, 1, (500, width)) * room
    others *= np.minimum(1, eps / others.sum(1, keepdims=True).clip(1e-300))
    assert (((others - size) ** 2).sum(1) >= ((z - size) ** 2).sum() - 1e-12 * (1 + size.max() ** 2)).all()


@given(SEEDS, st.integers(1, 12))
def test_l2_steepest_satisfies_the_optimality_conditions(seed, width):
    weight, room, eps = problem(seed, width)
    z = l2_steepest(row(weight), row(room), row(eps))[0].numpy()
    assert (z >= 0).all()
    assert (z <= room * (1 + 1e-12)).all()
    assert (z[weight == 0] == 0).all()
    norm, free = np.linalg.norm(z), (z < room * (1 - 1e-9)) & (weight > 0)
    assert norm <= eps * (1 + 1e-9)
    if free.any():  # then the budget is spent, free coordinates are proportional to the weights and the others are saturated
        assert norm == pytest.approx(eps, rel=1e-9)
        scale = z[free] / weight[free]
        np.testing.assert_allclose(scale, scale[0], rtol=1e-6)
        saturated = ~free & (weight > 0)
        assert (room[saturated] <= scale[0] * weight[saturated] * (1 + 1e-6)).all()
