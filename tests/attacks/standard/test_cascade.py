import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from small_problems import AnyOf, Exceed
from torch import nn

from robustkit import L2, Attack, Linf, Misclassify, Target
from robustkit.attacks import Standard
from robustkit.attacks.standard.cascade import CascadeState, Run, descend
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
class Ask(Attack):
    """The inside of an attack, seen from a test."""

    question: object

    def run(self, problem):
        return self.question(problem)


def ask(question, model, x, ref, threat, goal=Misclassify(margin), keep="last", **options):
    seen = {}

    def run(problem):
        seen["answer"] = question(problem)
        return problem.x

    result = Ask(run)(model, x, ref, threat=threat, goal=goal, keep=keep, **options)
    return seen["answer"], result


def pursuit_of(problem, budget=None):
    pursuit = CascadeState(problem, budget)
    pursuit.look()
    return pursuit


# Descent.


def by_hand(start, steps, reach, norm, eps):
    """The loop of `descend`, with nothing of the package in it."""
    x_adv, visited = start, []
    for step in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        out = NET(x_adv)
        right = out.gather(1, Y[:, None])[:, 0]
        loss = right - out.scatter(1, Y[:, None], -torch.inf).amax(1)
        (grad,) = torch.autograd.grad(loss.sum(), x_adv)
        visited.append((loss.detach(), x_adv.detach()))
        length = eps * float(reach) * (1 + math.cos(math.pi * step / steps)) / 2
        if norm is Linf:
            x_adv = X + (x_adv.detach() - length * grad.sign() - X).clamp(-eps, eps)
        else:  # what the box cuts off is not taken from the ball
            change = (x_adv.detach() - length * grad / grad.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1) - X
            x_adv = X + change * (eps / change.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None]
        x_adv = x_adv.clamp(0, 1)
    best = torch.stack([loss for loss, _ in visited]).argmin(0)
    return torch.stack([visited[int(place)][1][row] for row, place in enumerate(best)])


@pytest.mark.parametrize(("norm", "eps"), [(Linf, 0.3), (L2, 2.5)])
@pytest.mark.parametrize("reach", [2.0, 0.5])
def test_descend_is_the_best_iterate_of_a_loop_with_cosine_steps(norm, eps, reach):
    start = norm(eps).project(X + 0.1 * torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(1)), X)
    ours, result = ask(lambda p: descend(p, start, 7, reach), NET, X, Y, norm(eps))
    torch.testing.assert_close(ours, by_hand(start, 7, reach, norm, eps), rtol=0, atol=1e-12)
    assert (result.backwards == 7).all()


def test_each_example_has_a_first_step_of_its_own():
    reach = torch.tensor([0.5, 2.0, 1.0]).repeat(3)
    ours, _ = ask(lambda p: descend(p, X, 7, reach.to(p.x)), NET, X, Y, Linf(0.3))
    for value in (0.5, 1.0, 2.0):
        some = reach == value
        torch.testing.assert_close(ours[some], by_hand(X, 7, value, Linf, 0.3)[some], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("norm", "usual"), [(Linf, 2.0), (L2, 3.0)])
def test_the_usual_first_step_is_that_of_the_threat(norm, usual):
    ends = [ask(lambda p, r=reach: descend(p, X, 5, r), NET, X, Y, norm(0.3))[0] for reach in (None, usual, 2.5)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_step_along_the_edge_of_the_box_loses_nothing_of_the_ball():
    """Of the steepest direction (1, 3) the box forbids the second part: all of the budget goes to the first."""
    x = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def model(x):
        return torch.stack([torch.zeros_like(x[:, 0]), (x - 1) @ slope], 1)

    ours, _ = ask(lambda p: descend(p, p.x, 30), model, x, torch.zeros(1, dtype=torch.int64), L2(0.2))
    torch.testing.assert_close(ours, torch.tensor([[0.7, 1.0]], dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_last_iterate_is_not_always_the_best_one():
    """Else the test above would not see which one comes back."""
    ours = by_hand(X, 4, 2.0, Linf, 0.6)
    values = [margin(NET(point), Y) for point in (ours, by_hand(X, 1, 2.0, Linf, 0.6))]
    assert (values[0] > values[1]).any()
    ends, _ = ask(lambda p: descend(p, p.x, 4), NET, X, Y, Linf(0.6))
    assert torch.allclose(ends, ours)


def test_no_budget_is_what_a_first_step_of_two_spends_where_the_box_allows():
    """One step from x: the start is all that is judged, so it comes back."""
    ours, _ = ask(lambda p: descend(p, p.x, 1), NET, X, Y, Linf(0.1))
    assert torch.equal(ours, X)


# The order of the parts.


def ranks(pursuit, rows):
    """The wanted classes of each of the rows, in the order in which they are pursued, (M, parts)."""
    columns = []
    for rank in range(pursuit.parts):
        column = torch.full((len(rows),), -1)
        for run in pursuit.towards(rows, rank, rank):
            assert run.goal == ClassifyAs(margin)
            column[torch.isin(rows, run.rows)] = run.ref
        columns.append(column)
    return torch.stack(columns, 1)


def distances(dual):
    """From each point to the border between its class and each other, (30, 5); infinite to itself."""
    gaps = SCORES.gather(1, CLASS[:, None]) - SCORES
    lengths = torch.stack([(WEIGHT - WEIGHT[k]).norm(dual, 1) for k in CLASS.tolist()])
    return (gaps / lengths).scatter(1, CLASS[:, None], torch.inf)


@pytest.mark.parametrize(("norm", "dual"), [(Linf, 1), (L2, 2)])
def test_on_linear_classes_parts_come_by_their_distance(norm, dual):
    order, _ = ask(lambda p: ranks(pursuit_of(p), torch.arange(30)), linear, POINTS, CLASS, norm(0.01, bounds=None))
    assert torch.equal(order, distances(dual).argsort(1)[:, :4])
    by_logits = SCORES.scatter(1, CLASS[:, None], -torch.inf).argsort(1, descending=True)[:, :4]
    assert (order != by_logits).any(1).sum() > 10


def test_what_the_box_forbids_is_no_way_to_go():
    """Both of two borders are as far, but towards one of them the box leaves half of the room."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.95, 0.5], [0.5, 0.95], [0.5, 0.5]], dtype=torch.float64)
    bias = torch.stack([torch.tensor([1.5, 0.01, 0.0]), torch.tensor([1.5, 0.0, 0.01]), torch.tensor([1.5, 0.01, 0.0])])

    def model(x):  # the same gaps at each point, but for a hair
        return (x - x.detach()) @ weight.T + bias.to(x)

    order, _ = ask(lambda p: ranks(pursuit_of(p), torch.arange(3)), model, x, torch.zeros(3, dtype=torch.int64), Linf(0.1))
    assert order.tolist() == [[2, 1], [1, 2], [1, 2]]


def test_a_part_without_gradient_comes_last_and_the_others_as_the_goal_names_them():
    def model(x):
        return torch.stack([x[:, 0] * 0 + 3, x[:, 0].detach() + 1.5, x[:, 1] * 1e-3, x[:, 0].detach() + 1], 1)

    x = torch.full((2, 2), 0.5, dtype=torch.float64)
    order, _ = ask(lambda p: ranks(pursuit_of(p), torch.arange(2)), model, x, torch.zeros(2, dtype=torch.int64), Linf(0.1))
    assert order.tolist() == [[2, 1, 3]] * 2


def test_the_first_look_costs_one_pass_and_a_gradient_for_each_part():
    pursuit, result = ask(pursuit_of, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    assert (result.backwards == 4).all()
    assert (result.forwards == 2).all()  # the second is the verdict
    top = SCORES.topk(2, 1).values
    torch.testing.assert_close(pursuit.boundary_margin.double(), top[:, 0] - top[:, 1], rtol=1e-6, atol=1e-6)
    assert torch.equal(pursuit.clean, pursuit.boundary_margin)


# Parts of different goals.


def test_parts_of_different_goals_are_run_in_one_group_for_each_goal():
    """The model is x times (1, 3); a part's place is its edge over the slope of its column."""
    x = 0.8 * torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)
    ref = torch.linspace(1.1, 3.0, 12, dtype=torch.float64)
    rows = torch.tensor([11, 2, 5, 0])

    def question(problem):
        pursuit = pursuit_of(problem)
        return [list(pursuit.towards(rows, rank, rank)) for rank in range(pursuit.parts)]

    runs, _ = ask(question, lambda x: x * slope, x, ref, Linf(0.1), goal=AnyOf(3.0))
    wanted = torch.stack([ref, ref + 3.0, 2 * ref], 1)
    ways = (wanted - (x * slope)[:, [0, 1, 0]]) / slope[[0, 1, 0]]
    order = ways.argsort(1)
    assert len({tuple(row) for row in order[rows].tolist()}) > 1
    for rank, found in enumerate(runs):
        goals = [run.goal for run in found]
        assert len(set(goals)) == len(goals)
        got = {int(row): (run.goal, float(value)) for run in found for row, value in zip(run.rows, run.ref, strict=True)}
        numbers = {int(row): int(order[row, rank]) for row in rows}
        assert got == {row: (Exceed(number % 2), float(wanted[row, number])) for row, number in numbers.items()}


def test_runs_of_two_goals_at_once_keep_what_comes_nearest():
    x = torch.full((4, 2), 0.5, dtype=torch.float64)
    ref = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    slope = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def question(problem):
        pursuit, rows = pursuit_of(problem), torch.tensor([3, 1])
        pursuit.run([run for rank in range(3) for run in pursuit.towards(rows, rank, rank)], 5)
        return pursuit.boundary_margin, pursuit.nearest

    (edge, nearest), _ = ask(question, lambda x: x * slope - 1, x, ref, Linf(0.1), goal=AnyOf())
    # At x the second column is nearest with 1.5 - 0.5; a tenth more of x takes 0.3 from it.
    torch.testing.assert_close(edge, torch.tensor([1.0, 0.7, 1.0, 0.7]), rtol=0, atol=1e-6)
    torch.testing.assert_close(nearest[[0, 2]], x[[0, 2]])
    torch.testing.assert_close(nearest[[1, 3], 1], torch.full((2,), 0.6, dtype=torch.float64), rtol=0, atol=1e-6)


# Who takes part.


def test_rows_are_the_open_ones_that_have_come_near():
    def question(problem):
        pursuit = pursuit_of(problem)
        pursuit.boundary_margin = pursuit.clean * torch.linspace(0.05, 1.5, 30)
        at_the_goal = torch.arange(30) == 29
        pursuit.clean = torch.where(at_the_goal, -1.0, pursuit.clean)
        problem._best.unsolved[0] = False  # as if solved
        return [pursuit.rows("some", 0, within).tolist() for within in (0.02, 0.5, 1.0, math.inf)]

    (none, half, whole, every), _ = ask(question, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    share = torch.linspace(0.05, 1.5, 30)[1:29]
    assert none == [29]
    assert half == [*((share <= 0.5).nonzero().squeeze(1) + 1).tolist(), 29]
    assert whole == [*((share <= 1.0).nonzero().squeeze(1) + 1).tolist(), 29]
    assert every == list(range(1, 30))


def test_rows_are_those_that_can_pay_and_the_most_that_could_not_are_remembered():
    def question(problem):
        pursuit = pursuit_of(problem, 20)  # of which the look has taken 1 + 2 * 4
        problem[torch.tensor([4, 4, 7])].predict(problem.x[[4, 4, 7]])
        found = [pursuit.rows("stage", cost).tolist() for cost in (9, 10, 11, 10, 3)]
        return found, dict(pursuit.skipped)

    (found, skipped), _ = ask(question, linear, POINTS, CLASS, Linf(0.01, bounds=None))
    everyone = list(range(30))
    but = lambda *out: [row for row in everyone if row not in out]  # noqa: E731
    assert found == [everyone, but(4), but(4, 7), but(4), everyone]
    assert skipped == {"stage": 2}


# The search.


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.6)])
def test_search_never_loses_ground_and_stays_inside(threat):
    def question(problem):
        pursuit, path = pursuit_of(problem), []
        for number in range(4):
            path.append((pursuit.boundary_margin.clone(), pursuit.nearest.clone()))
            pursuit.search(torch.arange(1, 9), 50, 0.05, number)
        return [*path, (pursuit.boundary_margin, pursuit.nearest)]

    path, result = ask(question, NET, X, Y, threat)
    for (before, _), (after, _) in itertools.pairwise(path):
        assert (after <= before).all()
    assert (path[-1][0] < path[0][0])[1:].all()
    for edge, nearest in path:
        assert threat.contains(nearest, X).all()
        torch.testing.assert_close(edge.double(), -margin(NET(nearest), Y).detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(path[-1][1][0], X[0])  # who was not named stays where it was
    assert result.forwards[0] == 2
    assert (result.forwards[1:] <= 2 + 4 * 50).all()


@pytest.mark.parametrize(("queries", "asked"), [(25, 25), (50, 25), (75, 50), (150, 75), (600, 300)])
def test_who_gains_nothing_by_half_of_the_queries_is_let_go(queries, asked):
    """One row of the model grows with the mean, so that some window of each asking helps; the other is constant."""

    def model(x):
        wave = (x - X[:2].to(x)[: len(x)].mean() + 5).flatten(1).mean(1) * torch.where(x[:, 0, 0, 0] > 0.5, 1.0, 0.0)
        return torch.stack([torch.full_like(wave, 9.0), wave], 1)

    x = torch.full((2, 1, 8, 8), 0.25, dtype=torch.float64)
    x[1] = 0.75

    def question(problem):
        pursuit = pursuit_of(problem)
        before = problem.cost.clone()
        pursuit.search(torch.arange(2), queries, 0.05, 0)
        return problem.cost - before

    spent, _ = ask(question, model, x, torch.zeros(2, dtype=torch.int64), Linf(0.1))
    assert spent[0] == asked
    assert spent[1] >= spent[0]
    assert queries < 150 or spent[1] == queries


def test_no_more_images_at_once_than_the_target_allows():
    """Three runs of nine rows and a search over 25 windows; the look is one pass over all."""
    seen = []

    def model(x):
        seen.append(len(x))
        return linear(x)

    def question(problem):
        pursuit, rows = pursuit_of(problem), torch.arange(9)
        pursuit.run([run for rank in range(3) for run in pursuit.towards(rows, rank, rank)], 4)
        pursuit.search(rows, 50, 0.05, 0)
        return [run.rows.tolist() for run in pursuit.towards(rows, 0, 0)]

    def largest(most):
        seen.clear()
        _, result = ask(question, Target(model, batch_size=most), POINTS[:9], CLASS[:9], Linf(0.01, bounds=None))
        return max(seen), result.backwards.tolist()

    few, many = largest(20), largest(1000)
    assert few[0] == 20
    assert many[0] == 9 * 25
    assert few[1] == many[1] == [4 + 3 * 4] * 9


def test_a_worse_point_is_not_taken():
    def question(problem):
        pursuit = pursuit_of(problem)
        up = problem.threat.steepest(problem.loss_and_grad(problem.x)[1], problem.x)
        pursuit.take([Run(torch.arange(9), problem.goal, problem.ref, problem.x)], up)
        return pursuit.nearest

    nearest, _ = ask(question, NET, X, Y, Linf(0.01))
    assert torch.equal(nearest, X)


def test_who_is_solved_is_not_asked_again():
    def question(problem):
        pursuit = pursuit_of(problem)
        problem.success(problem.x.flip(0))
        gone, before = ~problem.unsolved, problem.cost
        pursuit.take([Run(torch.arange(9), problem.goal, problem.ref, problem.x)], problem.x)
        return gone, problem.cost - before

    (gone, paid), _ = ask(question, NET, X, Y, Linf(10.0, bounds=None), keep="first")
    assert 0 < gone.sum() < 9
    assert paid.tolist() == (~gone).long().tolist()


# Nobody else matters.


def each(x):
    """NET row by row: the same bits in any batch."""
    return torch.cat([NET(row[None]) for row in x])


@pytest.mark.parametrize("budget", [None, 500])
def test_the_result_of_an_example_does_not_depend_on_the_others(budget):
    """With a budget too: there some can pay for a stage in the middle, and others only for those after it."""
    attack, threat, part = Standard(steps=5, audit=False, budget=budget), Linf(0.05), torch.tensor([1, 2, 4, 6, 8])
    whole = attack(each, X, Y, threat=threat, seed=3)
    half = attack(each, X[part], Y[part], threat=threat, seed=3, ids=part)
    alone = attack(each, X[6:7], Y[6:7], threat=threat, seed=3, ids=torch.tensor([6]))
    for some, rows in ((half, part), (alone, torch.tensor([6]))):
        assert torch.equal(some.x_adv, whole.x_adv[rows])
        assert torch.equal(some.forwards, whole.forwards[rows])
        assert torch.equal(some.backwards, whole.backwards[rows])
