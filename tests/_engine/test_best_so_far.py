"""Which iterate comes back, on a path that is known in advance."""

from dataclasses import dataclass

import pytest
import torch

from robustkit import Attack, Linf
from robustkit.errors import ArgumentError
from robustkit.goals import Goal


@dataclass(frozen=True)
class Walk(Attack):
    """Visits x + delta for each delta of a list, and ends at the last."""

    deltas: tuple[float, ...]

    def run(self, problem):
        for step in problem.steps(len(self.deltas) - 1):
            problem.loss_and_grad(problem.x + self.deltas[step])
        return problem.x + self.deltas[-1]


@dataclass(frozen=True)
class Hits(Goal):
    """Success where the first coordinate of the input is one of some values; the loss is a table as well."""

    def loss(self, out, ref):
        return out[:, 0]

    def success(self, out, ref):
        return out[:, 1] > 0.5


# delta -> (loss, success)
TABLE = {0.0: (5.0, False), 0.1: (1.0, False), 0.2: (4.0, True), 0.05: (3.0, True), 0.4: (0.0, True), -0.1: (6.0, True)}


def table(x):
    """The loss and the success of each point, with a path for gradients."""
    rows = [min(TABLE, key=lambda d: abs(d - float(v) + 0.5)) for v in x.detach()[:, 0]]
    return torch.tensor([[TABLE[r][0], float(TABLE[r][1])] for r in rows]) + 0 * x.sum(1, keepdim=True)


def ends(keep, *deltas, eps=0.3):
    x = torch.full((2, 3), 0.5)
    result = Walk(deltas)(table, x, x, goal=Hits(), threat=Linf(eps), keep=keep)
    assert torch.equal(result.x_adv[0], result.x_adv[1])
    return pytest.approx(float(result.x_adv[0, 0]) - 0.5, abs=1e-6), bool(result.success[0]), int(result.forwards[0])


def test_first_is_the_first_success_and_the_rest_is_not_visited():
    # Two visits and the verdict: the walk ends once both examples are solved.
    assert ends("first", 0.0, 0.2, 0.05, 0.1) == (0.2, True, 3)


def test_smallest_is_the_smallest_success():
    assert ends("smallest", 0.2, 0.1, 0.05, -0.1, 0.1)[:2] == (0.05, True)


def test_best_is_the_lowest_loss_among_successes():
    # 0.1 has the lower loss but is no success: giving up a success for it would make the model look better than it is.
    assert ends("best", 0.2, 0.1, 0.05, -0.1)[:2] == (0.05, True)
    assert ends("best", 0.0, 0.1, 0.0)[:2] == (0.1, False)


def test_last_is_the_last_and_nothing_else_is_judged():
    assert ends("last", 0.2, 0.05, 0.1) == (0.1, False, 3)


def test_last_is_the_last_also_where_the_attack_looks_around():
    """Questions without a gradient are judged as well, and must not put a better point in the place of the last."""

    @dataclass(frozen=True)
    class Looks(Attack):
        def run(self, problem):
            problem.loss(problem.x + 0.05)
            problem.success(problem.x + 0.2)
            return problem.x + 0.1

    x = torch.full((2, 3), 0.5)
    result = Looks()(table, x, x, goal=Hits(), threat=Linf(0.3), keep="last")
    assert torch.equal(result.x_adv, x + 0.1)
    assert not result.success.any()


@pytest.mark.parametrize("keep", ["first", "best", "smallest"])
def test_a_success_outside_the_threat_does_not_count(keep):
    assert ends(keep, 0.4, 0.1)[:2] == (0.1, False)


def test_the_last_iterate_competes():
    assert ends("best", 0.0, 0.05)[:2] == (0.05, True)
    assert ends("smallest", 0.2, 0.05)[:2] == (0.05, True)
    assert ends("first", 0.1, 0.05)[:2] == (0.05, True)


def test_other_words_are_refused():
    with pytest.raises(ArgumentError, match="keep='nearest'"):
        ends("nearest", 0.0)
