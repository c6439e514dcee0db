"""Queries of another library go to the right example and are charged to it."""

import pytest
import torch
from torch import nn

from robustkit import Linf, Misclassify, Target
from robustkit._engine.best_so_far import BestSoFar
from robustkit._engine.noise import Noise
from robustkit.interop._problem_module import PartialBatchError, ProblemModule, group_by_eps, replace_non_finite
from robustkit.problem import Problem


def problem_of(n=3, batch_size=4, dtype=torch.float32, eps=0.5):
    torch.manual_seed(0)
    sizes, net = [], nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).to(dtype).eval()

    def spy(x):
        sizes.append(len(x))
        return net(x)

    x = torch.rand(n, 2, 3, dtype=dtype)
    best = BestSoFar("last", x, False)
    target = Target(spy, batch_size=batch_size, stochastic=False)
    ref = torch.zeros(n, dtype=torch.int64)
    return Problem(target, x, ref, Misclassify(), Linf(eps), Noise(0, torch.arange(n)), best), best.ledger, net, sizes


@pytest.mark.parametrize("batch_size", [3, 4, 7, 100])
def test_several_points_per_example(batch_size):
    problem, ledger, net, sizes = problem_of(batch_size=batch_size)
    points = torch.rand(15, 2, 3)
    assert torch.allclose(ProblemModule(problem)(points), net(points))
    assert ledger.forwards.tolist() == [5, 5, 5]
    assert max(sizes) <= batch_size
    x = points.clone().requires_grad_()
    (ProblemModule(problem)(x) ** 2).sum().backward()
    other = points.clone().requires_grad_()
    (net(other) ** 2).sum().backward()
    assert torch.allclose(x.grad, other.grad)
    assert ledger.forwards.tolist() == [10, 10, 10]
    assert ledger.backwards.tolist() == [5, 5, 5]


def test_the_model_runs_in_the_problems_dtype_and_gradients_have_the_inputs_dtype():
    problem, _, net, _ = problem_of(dtype=torch.float64)
    x = torch.rand(3, 2, 3, requires_grad=True)
    out = ProblemModule(problem)(x)
    assert torch.equal(out, net(x.double()))
    out.sum().backward()
    assert x.grad.dtype == torch.float32


def test_queries_of_some_examples_are_refused():
    problem, ledger, _, _ = problem_of()
    with pytest.raises(PartialBatchError, match="4 points for a batch of 3 examples"):
        ProblemModule(problem)(torch.rand(4, 2, 3))
    assert not ledger.forwards.any()


def test_unsolved_examples_are_grouped_by_eps():
    problem, _, _, _ = problem_of(n=4, eps=torch.tensor([0.5, 0.25, 0.5, 0.125]))
    assert [(eps, rows.tolist()) for eps, rows in group_by_eps(problem)] == [(0.125, [3]), (0.25, [1]), (0.5, [0, 2])]


def test_non_finite_images_are_replaced_by_x():
    x = torch.zeros(4, 2)
    x_adv = torch.tensor([[1.0, 2.0], [1.0, torch.inf], [torch.nan, 2.0], [-torch.inf, 0.0]])
    assert replace_non_finite(x_adv, x).tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]
