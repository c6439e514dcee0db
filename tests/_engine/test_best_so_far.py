"""Which iterate is returned, on a path that is known in advance."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit import Attack, Linf
from robustkit._engine.best_so_far import BestSoFar, check_keep
from robustkit.errors import ArgumentError
from robustkit.goals import Goal


@dataclass(frozen=True)
class FixedPath(Attack):
    """Queries x + delta for each delta of a list, and returns the last."""

    deltas: tuple[float, ...]

    def run(self, problem):
        for step in problem.steps(len(self.deltas) - 1):
            problem.loss_and_grad(problem.x + self.deltas[step])
        return problem.x + self.deltas[-1]


@dataclass(frozen=True)
class TableGoal(Goal):
    """Loss and success are the two outputs of `table`."""

    def loss(self, out, ref):
        return out[:, 0]

    def success(self, out, ref):
        return out[:, 1] > 0.5


# delta -> (loss, success)
TABLE = {0.0: (5.0, False), 0.1: (1.0, False), 0.2: (4.0, True), 0.05: (3.0, True), 0.4: (0.0, True), -0.1: (6.0, True)}


def table(x):
    """The loss and the success of each point, with a graph."""
    rows = [min(TABLE, key=lambda d: abs(d - float(v) + 0.5)) for v in x.detach()[:, 0]]
    return torch.tensor([[TABLE[r][0], float(TABLE[r][1])] for r in rows]) + 0 * x.sum(1, keepdim=True)


def returned(keep, *deltas, eps=0.3):
    x = torch.full((2, 3), 0.5)
    result = FixedPath(deltas)(table, x, x, goal=TableGoal(), threat=Linf(eps), keep=keep)
    assert torch.equal(result.x_adv[0], result.x_adv[1])
    return pytest.approx(float(result.x_adv[0, 0]) - 0.5, abs=1e-6), bool(result.success[0]), int(result.forwards[0])


def test_first_returns_the_first_success_and_queries_no_more():
    # Two queries and the verdict: the path ends once both examples are solved.
    assert returned("first", 0.0, 0.2, 0.05, 0.1) == (0.2, True, 3)


def test_smallest_returns_the_smallest_success():
    assert returned("smallest", 0.2, 0.1, 0.05, -0.1, 0.1)[:2] == (0.05, True)


def test_best_returns_the_success_with_the_lowest_loss():
    # 0.1 has the lower loss but is not a success: preferring it would overstate the robustness of the model.
    assert returned("best", 0.2, 0.1, 0.05, -0.1)[:2] == (0.05, True)
    assert returned("best", 0.0, 0.1, 0.0)[:2] == (0.1, False)


def test_last_returns_the_last_point_and_evaluates_no_other():
    assert returned("last", 0.2, 0.05, 0.1) == (0.1, False, 3)


def test_last_returns_the_last_point_if_the_attack_queries_others():
    """Queries without a gradient are evaluated too, and must not replace the last point by a better one."""

    @dataclass(frozen=True)
    class QueriesOthers(Attack):
        def run(self, problem):
            problem.loss(problem.x + 0.05)
            problem.success(problem.x + 0.2)
            return problem.x + 0.1

    x = torch.full((2, 3), 0.5)
    result = QueriesOthers()(table, x, x, goal=TableGoal(), threat=Linf(0.3), keep="last")
    assert torch.equal(result.x_adv, x + 0.1)
    assert not result.success.any()


@pytest.mark.parametrize("keep", ["first", "best", "smallest"])
def test_a_success_outside_the_threat_does_not_count(keep):
    assert returned(keep, 0.4, 0.1)[:2] == (0.1, False)


def test_the_last_iterate_competes():
    assert returned("best", 0.0, 0.05)[:2] == (0.05, True)
    assert returned("smallest", 0.2, 0.05)[:2] == (0.05, True)
    assert returned("first", 0.1, 0.05)[:2] == (0.05, True)


def test_an_unknown_keep_is_refused():
    with pytest.raises(ArgumentError, match="keep='nearest'"):
        returned("nearest", 0.0)


N, EPS = 5, 0.25
# Points are even multiples of a power of two, so that sizes are exact; 0.5 lies outside the threat.
POINTS = st.tuples(
    st.integers(0, N - 1),
    st.sampled_from([0.0, 0.125, 0.25, 0.5]),
    st.booleans(),
    st.sampled_from([-1.0, 0.0, 1.0, float("nan")]),
)


def slow(keep, stochastic, queries):
    """One point after the other: the position of the best point of each example, and which examples are unsolved."""
    best, unsolved = [None] * N, [True] * N
    for query in queries:
        unsolved_before = list(unsolved)
        for row, size, success, loss in query:
            if size > EPS or (not stochastic and keep in ("first", "smallest") and not success):
                continue
            if keep == "first" and not stochastic:
                if unsolved_before[row] and unsolved[row]:
                    best[row], unsolved[row] = (success, 0.0, size, loss), False
                continue
            undefined = float("-inf") if success else float("inf")
            score = size if keep == "smallest" and not stochastic else (undefined if loss != loss else loss)
            old = best[row] or (False, float("inf"), None, None)
            if (success, -score) > (old[0], -old[1]):
                best[row] = (success, score, size, loss)
    return best, unsolved


@given(
    st.sampled_from(["first", "best", "smallest"]),
    st.booleans(),
    st.lists(st.lists(POINTS, min_size=1, max_size=8), max_size=5),
)
def test_updates_agree_with_one_point_at_a_time(keep, stochastic, queries):
    x, threat = torch.zeros(N, 1), Linf(EPS, bounds=(0.0, 1.0))
    ours = BestSoFar(keep, x, stochastic)
    for query in queries:
        rows, sizes, success, loss = (torch.tensor(column) for column in zip(*query, strict=True))
        ours.update(rows, sizes[:, None], x[rows], threat, success, loss)
    best, unsolved = slow(keep, stochastic, queries)
    assert ours.unsolved.tolist() == unsolved
    assert ours.best.success.tolist() == [point is not None and point[0] for point in best]
    assert ours.best.x_adv[:, 0].tolist() == [0.0 if point is None else point[2] for point in best]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 1, 4, 0, 2]])
def test_the_order_of_the_rows_does_not_matter(order):
    """Rows in increasing order take a shorter path."""
    rows, sizes = torch.tensor(order), torch.linspace(0, 0.25, N)[:, None]
    best = BestSoFar("smallest", torch.zeros(N, 1), False)
    best.update(rows, sizes[rows], torch.zeros(N, 1), Linf(0.5), torch.ones(N, dtype=torch.bool), None)
    assert torch.equal(best.best.x_adv, sizes)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ArgumentError, match="keep='largest' must be one of first, best, smallest, last"):
        check_keep("largest")
