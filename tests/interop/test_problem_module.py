"""What another library asks through the door is answered for the right example, charged to it, and leaves no trace."""

import pytest
import torch
from torch import nn

from robustkit import Linf, Misclassify, Target
from robustkit._engine.best_so_far import BestSoFar
from robustkit._engine.noise import Noise
from robustkit.interop._problem_module import PartialBatchError, ProblemModule, group_by_eps, replace_non_finite
from robustkit.problem import Problem


def problem_of(n=3, most=4, dtype=torch.float32, eps=0.5):
    torch.manual_seed(0)
    sizes, net = [], nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).to(dtype).eval()

    def spy(x):
        sizes.append(len(x))
        return net(x)

    x = torch.rand(n, 2, 3, dtype=dtype)
    kept = BestSoFar("last", x, False)
    target = Target(spy, batch_size=most, stochastic=False)
    ref = torch.zeros(n, dtype=torch.int64)
    return Problem(target, x, ref, Misclassify(), Linf(eps), Noise(0, torch.arange(n)), kept), kept.ledger, net, sizes


@pytest.mark.parametrize("most", [3, 4, 7, 100])
def test_all_of_them_several_times_over(most):
    problem, ledger, net, sizes = problem_of(most=most)
    points = torch.rand(15, 2, 3)
    assert torch.allclose(ProblemModule(problem)(points), net(points))
    assert ledger.forwards.tolist() == [5, 5, 5]
    assert max(sizes) <= most
    asked = points.clone().requires_grad_()
    (ProblemModule(problem)(asked) ** 2).sum().backward()
    other = points.clone().requires_grad_()
    (net(other) ** 2).sum().backward()
    assert torch.allclose(asked.grad, other.grad)
    assert ledger.forwards.tolist() == [10, 10, 10]
    assert ledger.backwards.tolist() == [5, 5, 5]


def test_the_type_of_the_problem_is_kept_inside_and_that_of_the_question_outside():
    problem, _, net, _ = problem_of(dtype=torch.float64)
    asked = torch.rand(3, 2, 3, requires_grad=True)
    out = ProblemModule(problem)(asked)
    assert torch.equal(out, net(asked.double()))
    out.sum().backward()
    assert asked.grad.dtype == torch.float32


def test_some_of_them_alone_are_refused():
    problem, ledger, _, _ = problem_of()
    with pytest.raises(PartialBatchError, match="4 points while 3 examples"):
        ProblemModule(problem)(torch.rand(4, 2, 3))
    assert not ledger.forwards.any()


def test_budgets_come_one_after_the_other():
    problem, _, _, _ = problem_of(n=4, eps=torch.tensor([0.5, 0.25, 0.5, 0.125]))
    assert [(eps, rows.tolist()) for eps, rows in group_by_eps(problem)] == [(0.125, [3]), (0.25, [1]), (0.5, [0, 2])]


def test_an_image_with_anything_that_is_no_number_is_not_taken():
    x = torch.zeros(4, 2)
    found = torch.tensor([[1.0, 2.0], [1.0, torch.inf], [torch.nan, 2.0], [-torch.inf, 0.0]])
    assert replace_non_finite(found, x).tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]
