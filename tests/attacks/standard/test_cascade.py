"""The descents of the cascade, the ranking of parts, and the examples that each stage works on."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from small_problems import AnyOf, Exceed
from torch import nn

from robustkit import L2, Attack, Linf, Misclassify, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard.cascade import CascadeState, DescentSpec, descend
from robustkit.goals import ClassifyAs
from robustkit.losses import margin

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5)).double()
X = torch.rand(9, 1, 8, 8, dtype=torch.float64)
Y = NET(X).argmax(1)

WEIGHT = torch.randn(5, 6, dtype=torch.float64) * torch.tensor([1.0, 0.2, 3.0, 0.5, 2.0], dtype=torch.float64)[:, None]
POINTS = torch.randn(30, 6, dtype=torch.float64)
SCORES = POINTS @ WEIGHT.T
CLASS = SCORES.argmax(1)


def linear(x):
    return x @ WEIGHT.T


@dataclass(frozen=True)
class Inside(Attack):
    """An attack that calls `body` with its problem."""

    body: object

    def run(self, problem):
        return self.body(problem)


def run_inside(body, model, x, ref, threat, goal=Misclassify(margin), keep="last", **options):
    """What `body` returns for the problem of an attack, and the result of the attack."""
    returned = []

    def run(problem):
        returned.append(body(problem))
        return problem.x

    result = Inside(run)(model, x, ref, threat=threat, goal=goal, keep=keep, **options)
    return returned[-1], result


def state_of(problem, budget=None):
    """The state after the first pass."""
    state = CascadeState(problem, budget)
    state.first_pass()
    return state


# Descent.


def reference_descent(start, steps, reach, norm, eps):
    """The loop of `descend`, written without the package."""
    x_adv, visited = start, []
    for step in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        out = NET(x_adv)
        logit = out.gather(1, Y[:, None])[:, 0]
        loss = logit - out.scatter(1, Y[:, None], -torch.inf).amax(1)
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
        visited.append((loss.detach(), x_adv.detach()))
        length = eps * float(reach) * (1 + math.cos(math.pi * step / steps)) / 2
        if norm is Linf:
            x_adv = X + (x_adv.detach() - length * grad.sign() - X).clamp(-eps, eps)
        else:  # the step is clamped to the box before the perturbation is shrunk to the ball
            perturbation = (x_adv.detach() - length * grad / grad.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1) - X
            scale = (eps / perturbation.flatten(1).norm(dim=1)).clamp(max=1)
            x_adv = X + perturbation * scale[:, None, None, None]
        x_adv = x_adv.clamp(0, 1)
    best = torch.stack([loss for loss, _ in visited]).argmin(0)
    return torch.stack([visited[int(step)][1][row] for row, step in enumerate(best)])


@pytest.mark.parametrize(("norm", "eps"), [(Linf, 0.3), (L2, 2.5)])
@pytest.mark.parametrize("reach", [2.0, 0.5])
def test_descend_returns_the_best_iterate_of_a_loop_with_cosine_steps(norm, eps, reach):
    start = norm(eps).project(X + 0.1 * torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(1)), X)
    ours, result = run_inside(lambda p: descend(p, start, 7, reach), NET, X, Y, norm(eps))
    torch.testing.assert_close(ours, reference_descent(start, 7, reach, norm, eps), rtol=0, atol=1e-12)
    assert (result.backwards == 7).all()


def test_each_example_may_have_its_own_first_step_size():
    reach = torch.tensor([0.5, 2.0, 1.0]).repeat(3)
    ours, _ = run_inside(lambda p: descend(p, X, 7, reach.to(p.x)), NET, X, Y, Linf(0.3))
    for value in (0.5, 1.0, 2.0):
        rows = reach == value
        torch.testing.assert_close(ours[rows], reference_descent(X, 7, value, Linf, 0.3)[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "default"), [(Linf, 2.0), (L2, 3.0)])
def test_the_default_first_step_size_is_that_of_the_threat(norm, default):
    ends = [run_inside(lambda p, r=reach: descend(p, X, 5, r), NET, X, Y, norm(0.3))[0] for reach in (None, default, 2.5)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_step_along_the_bounds_of_the_box_spends_the_whole_budget():
    """The box blocks the second coordinate of the steepest direction (1, 3); the first gets the whole budget."""
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def model(x):
        return torch.stack([torch.zeros_like(x[:, 0]), (x - 1) @ slope], 1)

    ours, _ = run_inside(lambda p: descend(p, p.x, 30), model, x, torch.zeros(1, dtype=torch.int64), L2(0.2))
    torch.testing.assert_close(ours, torch.tensor([[0.7, 1.0]], dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_last_iterate_is_not_always_the_best_one():
    """Otherwise the first test would not show which iterate is returned."""
    ours = reference_descent(X, 4, 2.0, Linf, 0.6)
    values = [margin(NET(point), Y) for point in (ours, reference_descent(X, 1, 2.0, Linf, 0.6))]
    assert (values[0] > values[1]).any()
    ends, _ = run_inside(lambda p: descend(p, p.x, 4), NET, X, Y, Linf(0.6))
    assert torch.allclose(ends, ours)


def test_the_point_after_the_last_step_is_not_evaluated():
    """A descent of one step returns its start."""
    ours, _ = run_inside(lambda p: descend(p, p.x, 1), NET, X, Y, Linf(0.1))
    assert torch.equal(ours, X)


# The ranking of parts.


def ranking(state, rows):
    """The target classes of the examples `rows` in the order of their ranks, (M, parts)."""
    columns = []
    for rank in range(state.part_count):
        column = torch.full((len(rows),), -1)
        for spec in state.descents_towards(rows, rank, rank):
            assert spec.goal == ClassifyAs(margin)
            column[torch.isin(rows, spec.rows)] = spec.ref
        columns.append(column)
    return torch.stack(columns, 1)


def distances(dual):
    """The distance of each point to the boundary between its class and each other one, (30, 5); infinite for its own."""
    gaps = SCORES.gather(1, CLASS[:, None]) - SCORES
    lengths = torch.stack([(WEIGHT - WEIGHT[k]).norm(dual, 1) for k in CLASS.tolist()])
    return (gaps / lengths).scatter(1, CLASS[:, None], torch.inf)


@pytest.mark.parametrize(("norm", "dual"), [(Linf, 1), (L2, 2)])
def test_parts_of_a_linear_model_are_ranked_by_distance(norm, dual):
    order, _ = run_inside(lambda p: ranking(state_of(p), torch.arange(30)), linear, POINTS, CLASS, norm(0.01, bounds=None))
    assert torch.equal(order, distances(dual).argsort(1)[:, :4])
    by_logits = SCORES.scatter(1, CLASS[:, None], -torch.inf).argsort(1, descending=True)[:, :4]
    assert (order != by_logits).any(1).sum() > 10


def test_the_ranking_accounts_for_the_box():
    """Two boundaries are equally far, but towards one of them the box allows half of the budget only."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.95, 0.5], [0.5, 0.95], [0.5, 0.5]], dtype=torch.float64)
    bias = torch.stack([torch.tensor([1.5, 0.01, 0.0]), torch.tensor([1.5, 0.0, 0.01]), torch.tensor([1.5, 0.01, 0.0])])

    def model(x):  # almost the same margins at each point
        return (x - x.detach()) @ weight.T + bias.to(x)

    order, _ = run_inside(
        lambda p: ranking(state_of(p), torch.arange(3)), model, x, torch.zeros(3, dtype=torch.int64), Linf(0.1)
    )
    assert order.tolist() == [[2, 1], [1, 2], [1, 2]]


def test_parts_without_a_gradient_are_ranked_last_in_the_order_of_the_goal():
    def model(x):
        return torch.stack([x[:, 0] * 0 + 3, x[:, 0].detach() + 1.5, x[:, 1] * 1e-3, x[:, 0].detach() + 1], 1)

    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    order, _ = run_inside(
        lambda p: ranking(state_of(p), torch.arange(2)), model, x, torch.zeros(2, dtype=torch.int64), Linf(0.1)
    )
    assert order.tolist() == [[2, 1, 3]] * 2


def test_the_first_pass_costs_one_forward_and_a_gradient_per_part():
    state, result = run_inside(state_of, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    assert (result.backwards == 4).all()
    assert (result.forwards == 2).all()  # the second is the final evaluation
    top = SCORES.topk(2, 1).values
    torch.testing.assert_close(state.best.loss.double(), top[:, 0] - top[:, 1], rtol=1e-6, atol=1e-6)
    assert torch.equal(state.clean_margin, state.best.loss)


# Parts of different goals.


def test_parts_of_different_goals_give_one_descent_per_goal():
    """The model is x times (1, 3); parts are ranked by their margin divided by the slope of their column."""
    x = 0.8 * torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)
    ref = torch.linspace(1.1, 3.0, 12, dtype=torch.float64)
    rows = torch.tensor([11, 2, 5, 0])

    def body(problem):
        state = state_of(problem)
        return [list(state.descents_towards(rows, rank, rank)) for rank in range(state.part_count)]

    specs, _ = run_inside(body, lambda x: x * slope, x, ref, Linf(0.1), goal=AnyOf(3.0))
    refs = torch.stack([ref, ref + 3.0, 2 * ref], 1)
    distances = (refs - (x * slope)[:, [0, 1, 0]]) / slope[[0, 1, 0]]
    order = distances.argsort(1)
    assert len({tuple(row) for row in order[rows].tolist()}) > 1
    for rank, group in enumerate(specs):
        goals = [spec.goal for spec in group]
        assert len(set(goals)) == len(goals)
        aims = {int(row): (spec.goal, float(value)) for spec in group for row, value in zip(spec.rows, spec.ref, strict=True)}
        numbers = {int(row): int(order[row, rank]) for row in rows}
        assert aims == {row: (Exceed(number % 2), float(refs[row, number])) for row, number in numbers.items()}


def test_descents_on_two_goals_keep_the_point_of_smallest_margin():
    x = torch.full((4, 2), 0.5, dtype=torch.float64)
    ref = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def body(problem):
        state, rows = state_of(problem), torch.tensor([3, 1])
        state.run_descents([spec for rank in range(3) for spec in state.descents_towards(rows, rank, rank)], 5)
        return state.best

    best, _ = run_inside(body, lambda x: x * slope - 1, x, ref, Linf(0.1), goal=AnyOf())
    # At x the second column has the smallest margin, 1.5 - 0.5; adding 0.1 to x lowers it by 0.3.
    torch.testing.assert_close(best.loss, torch.tensor([1.0, 0.7, 1.0, 0.7]), rtol=0, atol=1e-6)
    torch.testing.assert_close(best.x_adv[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(best.x_adv[[1, 3], 1], torch.full((2,), 0.6, dtype=torch.float64), rtol=0, atol=1e-6)


# Which examples take part in a stage.


def test_a_stage_works_on_the_unsolved_examples_with_a_small_margin_ratio():
    def body(problem):
        state = state_of(problem)
        state.best.loss = state.clean_margin * torch.linspace(0.05, 1.5, 30)
        misclassified = torch.arange(30) == 29
        state.clean_margin = torch.where(misclassified, -1.0, state.clean_margin)
        problem._best.unsolved[0] = False  # as if solved
        return [state.affordable_rows("stage", 0, ratio).tolist() for ratio in (0.02, 0.5, 1.0, math.inf)]

    (none, half, whole, all_rows), _ = run_inside(body, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    ratio = torch.linspace(0.05, 1.5, 30)[1:29]
    assert none == [29]
    assert half == [*((ratio <= 0.5).nonzero().squeeze(1) + 1).tolist(), 29]
    assert whole == [*((ratio <= 1.0).nonzero().squeeze(1) + 1).tolist(), 29]
    assert all_rows == list(range(1, 30))


def test_a_stage_works_on_the_examples_that_can_afford_it_and_the_largest_number_of_others_is_recorded():
    def body(problem):
        state = state_of(problem, 20)  # the first pass costs 1 + 2 * 4
        problem[torch.tensor([4, 4, 7])].predict(problem.x[[4, 4, 7]])
        rows = [state.affordable_rows("stage", cost).tolist() for cost in (9, 10, 11, 10, 3)]
        return rows, dict(state.skipped)

    (rows, skipped), _ = run_inside(body, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    all_rows = list(range(30))
    without = lambda *skipped: [row for row in all_rows if row not in skipped]  # noqa: E731
    assert rows == [all_rows, without(4), without(4, 7), without(4), all_rows]
    assert skipped == {"stage": 2}


# The search over patches, and updates of the best points.


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6)])
def test_the_search_never_increases_a_margin_and_stays_in_the_threat_set(threat):
    def body(problem):
        state, path = state_of(problem), []
        for number in range(4):
            path.append((state.best.loss.clone(), state.best.x_adv.clone()))
            state.search_patches(torch.arange(1, 9), 50, 0.05, number)
        return [*path, (state.best.loss, state.best.x_adv)]

    path, result = run_inside(body, NET, X, Y, threat)
    for (before, _), (after, _) in itertools.pairwise(path):
        assert (after <= before).all()
    assert (path[-1][0] < path[0][0])[1:].all()
    for loss, x_adv in path:
        assert threat.contains(x_adv, X).all()
        torch.testing.assert_close(loss.double(), -margin(NET(x_adv), Y).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(path[-1][1][0], X[0])  # not among the searched examples
    assert result.forwards[0] == 2
    assert (result.forwards[1:] <= 2 + 4 * 50).all()


@pytest.mark.parametrize(("queries", "spent"), [(25, 25), (50, 25), (75, 50), (150, 75), (600, 300)])
def test_examples_without_improvement_within_half_of_the_queries_are_given_up(queries, spent):
    """For one example the score grows with the mean, so that some patch of each batch helps; for the other it is constant."""

    def model(x):
        score = (x - X[:2].to(x)[: len(x)].mean() + 5).flatten(1).mean(1) * torch.where(x[:, 0, 0, 0] > 0.5, 1.0, 0.0)
        return torch.stack([torch.full_like(score, 9.0), score], 1)

    x = torch.full((2, 1, 8, 8), 0.25, dtype=torch.float64)
    x[1] = 0.75

    def body(problem):
        state = state_of(problem)
        before = problem.cost.clone()
        state.search_patches(torch.arange(2), queries, 0.05, 0)
        return problem.cost - before

    cost, _ = run_inside(body, model, x, torch.zeros(2, dtype=torch.int64), Linf(0.1))
    assert cost[0] == spent
    assert cost[1] >= cost[0]
    assert queries < 150 or cost[1] == queries


def test_batches_are_no_larger_than_the_target_allows():
    """Three descents of nine examples and a search with 25 candidates each; the first pass is one batch."""
    sizes = []

    def model(x):
        sizes.append(len(x))
        return linear(x)

    def body(problem):
        state, rows = state_of(problem), torch.arange(9)
        state.run_descents([spec for rank in range(3) for spec in state.descents_towards(rows, rank, rank)], 4)
        state.search_patches(rows, 50, 0.05, 0)

    def largest_batch(limit):
        sizes.clear()
        _, result = run_inside(body, Target(model, batch_size=limit), POINTS[:9], CLASS[:9], Linf(0.01, bounds=None))
        return max(sizes), result.backwards.tolist()

    small, large = largest_batch(20), largest_batch(1000)
    assert small[0] == 20
    assert large[0] == 9 * 25
    assert small[1] == large[1] == [4 + 3 * 4] * 9


def test_points_with_a_larger_margin_are_not_kept():
    def body(problem):
        state = state_of(problem)
        up = problem.threat.steepest(problem.loss_and_grad(problem.x)[1], problem.x)
        state.update_best([DescentSpec(torch.arange(9), problem.goal, problem.ref, problem.x)], up)
        return state.best.x_adv

    x_adv, _ = run_inside(body, NET, X, Y, Linf(0.01))
    assert torch.equal(x_adv, X)


def test_solved_examples_are_not_queried_again():
    def body(problem):
        state = state_of(problem)
        problem.success(problem.x.flip(0))
        solved, before = ~problem.unsolved, problem.cost
        state.update_best([DescentSpec(torch.arange(9), problem.goal, problem.ref, problem.x)], problem.x)
        return solved, problem.cost - before

    (solved, cost), _ = run_inside(body, NET, X, Y, Linf(10.0, bounds=None), keep="first")
    assert 0 < solved.sum() < 9
    assert cost.tolist() == (~solved).long().tolist()


# Independence of the other examples.


def one_by_one(x):
    """NET on one example at a time: the same bits in any batch."""
    return torch.cat([NET(row[None]) for row in x])


@pytest.mark.parametrize("budget", [None, 500])
def test_the_result_of_an_example_does_not_depend_on_the_others(budget):
    """With a budget too: some examples can afford a stage in the middle, others only later ones."""
    attack, threat, part = Standard(steps=5, audit=False, budget=budget), Linf(0.05), torch.tensor([1, 2, 4, 6, 8])
    whole = attack(one_by_one, X, Y, threat=threat, seed=3)
    half = attack(one_by_one, X[part], Y[part], threat=threat, seed=3, ids=part)
    alone = attack(one_by_one, X[6:7], Y[6:7], threat=threat, seed=3, ids=torch.tensor([6]))
    for result, rows in ((half, part), (alone, torch.tensor([6]))):
        assert torch.equal(result.x_adv, whole.x_adv[rows])
        assert torch.equal(result.forwards, whole.forwards[rows])
        assert torch.equal(result.backwards, whole.backwards[rows])
