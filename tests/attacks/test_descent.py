"""Gradient descent on quadratics, whose iterates are known in closed form, and the best point so far."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from robustkit import L2, Attack, Goal
from robustkit.attacks._descent import BestPoint, cosine_decay, gradient_descent

N, RATE = 5, 0.3
THREAT = L2(100.0, bounds=None)
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CENTRE = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass(frozen=True)
class Distance(Goal):
    """Half the squared distance to the reference; success within `radius`."""

    radius: float = 0.0

    def loss(self, out, ref):
        return (out - ref).square().sum(1) / 2

    def success(self, out, ref):
        return self.loss(out, ref) < self.radius**2 / 2


@dataclass(frozen=True)
class Descent(Attack):
    """Runs `body` on the problem."""

    body: object

    def run(self, problem):
        return self.body(problem)


def run(body, *, goal=Distance(), keep="last", model=lambda x: x):
    return Descent(body)(model, X, CENTRE, threat=THREAT, goal=goal, keep=keep)


def plain_step(step, x_adv, grad):
    return x_adv - RATE * grad


def half_squared_norm(x):
    return x.square().sum(1) / 2


def test_descent_on_a_quadratic_is_geometric():
    """The distance to the minimum shrinks by 1 - rate in each step."""
    result = run(lambda problem: gradient_descent(problem, problem.x, range(7), plain_step))
    torch.testing.assert_close(result.x_adv, CENTRE + (1 - RATE) ** 7 * (X - CENTRE))
    assert (result.backwards == 7).all()


def test_points_are_observed_with_their_losses_before_each_update():
    seen = []
    run(lambda p: gradient_descent(p, p.x, range(4), plain_step, lambda x_adv, loss: seen.append((x_adv, loss))))
    assert len(seen) == 4
    for step, (x_adv, loss) in enumerate(seen):
        torch.testing.assert_close(x_adv, CENTRE + (1 - RATE) ** step * (X - CENTRE))
        torch.testing.assert_close(loss, half_squared_norm(x_adv - CENTRE))


def test_update_rules_get_step_numbers_and_may_keep_state():
    """Heavy-ball momentum, against a loop without the package."""
    velocity, steps = torch.zeros_like(X), []

    def momentum(step, x_adv, grad):
        nonlocal velocity
        velocity = 0.5 * velocity + grad
        steps.append(step)
        return x_adv - RATE * velocity

    result = run(lambda problem: gradient_descent(problem, problem.x, range(3, 8), momentum))
    expected, mean = X, torch.zeros_like(X)
    for _ in range(5):
        mean = 0.5 * mean + (expected - CENTRE)
        expected = expected - RATE * mean
    torch.testing.assert_close(result.x_adv, expected)
    assert steps == [3, 4, 5, 6, 7]


def test_the_descent_ends_when_the_steps_end():
    """`Problem.steps` ends when all examples are solved; solved examples are not queried again."""
    radius = 0.5
    result = run(lambda p: gradient_descent(p, p.x, p.steps(50), plain_step), goal=Distance(radius), keep="first")
    distance = (X - CENTRE).norm(dim=1)
    needed = [max(0, math.ceil(math.log(radius / float(start)) / math.log(1 - RATE))) for start in distance]
    assert result.success.all()
    assert result.backwards.tolist() == [steps + 1 for steps in needed]


def test_inactive_examples_are_not_queried_and_keep_their_points():
    counts, losses = torch.tensor([0, 1, 2, 5, 3]), []

    def body(problem):
        return gradient_descent(
            problem,
            problem.x,
            range(9),
            plain_step,
            lambda x_adv, loss: losses.append(loss),
            active=lambda step: step < counts,
        )

    result = run(body)
    torch.testing.assert_close(result.x_adv, CENTRE + (1 - RATE) ** counts[:, None] * (X - CENTRE))
    assert result.backwards.tolist() == counts.tolist()
    assert len(losses) == 5
    assert [loss.isinf().tolist() for loss in losses] == [(step >= counts).tolist() for step in range(5)]


def test_the_best_point_of_a_descent_that_overshoots():
    """With a factor of -1.5 per step the first point is the best; with decreasing steps it is a later one."""

    def shrinking(step, x_adv, grad):
        return x_adv - 2.5 * cosine_decay(step, 6) * grad

    for update in (lambda step, x_adv, grad: x_adv - 2.5 * grad, shrinking):
        seen, best = [], BestPoint(X)

        def observe(x_adv, loss, seen=seen, best=best):
            seen.append((x_adv, loss))
            best.update(x_adv, loss)

        run(lambda problem, update=update, observe=observe: gradient_descent(problem, problem.x, range(6), update, observe))
        for row in range(N):
            x_adv, loss = min(((points[row], losses[row]) for points, losses in seen), key=lambda pair: float(pair[1]))
            assert torch.equal(best.x_adv[row], x_adv)
            assert best.loss[row] == loss
    assert not torch.equal(best.x_adv, X)


def test_the_best_point_recomputed_slowly():
    generator = torch.Generator().manual_seed(0)
    best, kept = BestPoint(X), [(math.inf, X[row]) for row in range(N)]
    for _ in range(40):
        rows = torch.randperm(N, generator=generator)[: int(torch.randint(1, N + 1, (), generator=generator))]
        points = torch.randn(len(rows), 3, generator=generator, dtype=torch.float64)
        losses = torch.randn(len(rows), generator=generator, dtype=torch.float64)
        best.update(points, losses, rows)
        for row, point, loss in zip(rows.tolist(), points, losses.tolist(), strict=True):
            kept[row] = min(kept[row], (loss, point), key=lambda pair: pair[0])
    assert best.loss.tolist() == [loss for loss, _ in kept]
    assert torch.equal(best.x_adv, torch.stack([point for _, point in kept]))


@pytest.mark.parametrize("rows", [None, torch.arange(N)])
def test_of_equal_losses_the_first_is_kept(rows):
    best = BestPoint(X)
    best.update(X + 1, torch.zeros(N, dtype=torch.float64), rows)
    best.update(X + 2, torch.zeros(N, dtype=torch.float64), rows)
    assert torch.equal(best.x_adv, X + 1)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_points_without_a_finite_loss_are_never_better(loss):
    best = BestPoint(X)
    best.update(X + 1, torch.full((N,), loss, dtype=torch.float64))
    assert torch.equal(best.x_adv, X)
    assert best.loss.isinf().all()


def test_updates_do_not_write_to_the_tensors_that_were_passed_in():
    x_adv, loss = X.clone(), torch.ones(N, dtype=torch.float64)
    best = BestPoint(x_adv, loss)
    part = best[torch.tensor([3, 1])]
    part.update(X[[3, 1]] - 1, torch.zeros(2, dtype=torch.float64))
    best.update(X[:1] + 1, torch.zeros(1, dtype=torch.float64), torch.tensor([0]))
    assert torch.equal(x_adv, X)
    assert torch.equal(loss, torch.ones(N, dtype=torch.float64))
    assert best.loss.tolist() == [0, 1, 1, 1, 1]
    assert torch.equal(part.x_adv, X[[3, 1]] - 1)


def test_losses_are_compared_in_their_own_precision_and_kept_in_that_of_the_best():
    best = BestPoint(X, torch.ones(N))
    best.update(X + 1, torch.full((N,), 1 - 1e-12, dtype=torch.float64))
    assert torch.equal(best.x_adv, X + 1)
    assert best.loss.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_cosine_schedule_falls_from_one_towards_zero(steps):
    factors = [cosine_decay(step, steps) for step in range(steps)]
    assert factors == [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    assert factors[0] == 1
    assert all(0 < after < before for before, after in itertools.pairwise(factors))
