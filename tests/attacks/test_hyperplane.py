"""Projection onto a hyperplane inside a box, compared with bisection and with values by hand."""

import pytest
import torch

from robustkit import L2, Linf
from robustkit.attacks._hyperplane import move_length, project_to_hyperplane


def random_tensor(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bisect_move(norm, x, grad, value):
    """The move of length t per unit of slope, clamped to the box, for the t at which the linear function is zero."""
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), torch.full((len(x), 1), 1e6, dtype=torch.float64)
    direction = -value.sign()[:, None] * (grad if norm is L2 else grad.sign())
    for _ in range(200):
        time = (low + high) / 2
        move = (x + time * direction).clamp(0, 1) - x
        beyond = (value + (grad * move).sum(1)) * value.sign() < 0
        low, high = torch.where(beyond[:, None], low, time), torch.where(beyond[:, None], time, high)
    return (x + high * direction).clamp(0, 1) - x


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.25, 2.75)])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_it_is_the_smallest_move_to_the_hyperplane(norm, bounds, sign):
    """The problem scales with the box: positions and moves grow with it, slopes shrink."""
    low, width = bounds[0], bounds[1] - bounds[0]
    unit, grad = random_tensor(50, 12), random_tensor(50, 12, seed=1) * 4 - 2
    unit[:, 0], unit[:, 1] = 0, 1  # at the bounds
    reach = (grad.abs() * torch.where(sign * grad > 0, unit, 1 - unit)).sum(1)  # the largest decrease that the box allows
    value = sign * torch.linspace(0.05, 0.9, 50, dtype=torch.float64) * reach
    x = low + width * unit
    move_found = project_to_hyperplane(norm(0.1, bounds=bounds), x, grad / width, value)
    torch.testing.assert_close(move_found / width, bisect_move(norm, unit, grad, value), rtol=1e-4, atol=2e-4)
    assert (value + (grad / width * move_found).sum(1)).abs().max() < 1e-3 * value.abs().max()
    assert ((x + move_found >= low - 1e-12) & (x + move_found <= bounds[1] + 1e-12)).all()
    assert (
        ((x + move_found - low).abs() < 1e-12) | ((x + move_found - bounds[1]).abs() < 1e-12)
    ).any()  # some coordinates reach a bound


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_tiny_and_huge_slopes_give_the_same_move(norm, scale, bounds):
    """Their squares underflow or overflow in float32."""
    x, grad, value = torch.full((1, 2), 0.5), torch.tensor([[3.0, -4.0]]), torch.tensor([1.0])
    move_found = project_to_hyperplane(norm(0.1, bounds=bounds), x, scale * grad, scale * value)
    torch.testing.assert_close(move_found, project_to_hyperplane(norm(0.1, bounds=bounds), x, grad, value))
    assert move_found.abs().min() > 0.05


def test_the_length_of_a_move_is_its_norm():
    move = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
    assert move_length(L2(0.1), move).tolist() == [5.0, 0.0]
    assert move_length(Linf(0.1), move).tolist() == [4.0, 0.0]


@pytest.mark.parametrize(("norm", "move"), [(L2, [-1.2, 1.6]), (Linf, [-10 / 7, 10 / 7])])
def test_without_a_box_it_is_the_dual_direction(norm, move):
    """From a value of 10 with slopes (3, -4): 10 / 25 of the slopes, or 10 / 7 against each sign."""
    x, grad = torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])
    move_found = project_to_hyperplane(norm(0.1, bounds=None), x, grad, torch.tensor([10.0]))
    torch.testing.assert_close(move_found, torch.tensor([move]))
    back = project_to_hyperplane(norm(0.1, bounds=None), x, grad, torch.tensor([-10.0]))
    torch.testing.assert_close(back, -move_found)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_an_infeasible_move_goes_to_the_bounds(norm):
    x, grad = torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[1.0, -2.0, 0.0]])
    move_found = project_to_hyperplane(norm(0.1), x, grad, torch.tensor([5.0]))
    torch.testing.assert_close(move_found, torch.tensor([[-0.2, 0.1, 0.0]]))


def test_nothing_moves_on_the_hyperplane_or_without_a_slope():
    x = torch.tensor([[0.2, 0.9], [0.2, 0.9]])
    move_found = project_to_hyperplane(L2(0.1), x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert torch.equal(move_found, torch.zeros(2, 2))
