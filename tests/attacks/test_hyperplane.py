"""The nearest point on a plane inside a box, against bisection and by hand."""

import pytest
import torch

from robustkit import L2, Linf
from robustkit.attacks._hyperplane import far, project_to_hyperplane


def dice(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bisected(norm, x, grad, value):
    """The move of length t per unit of slope, cut to the box, for the t that brings the linear function to zero."""
    low, high = torch.zeros(len(x), 1, dtype=torch.float64), torch.full((len(x), 1), 1e6, dtype=torch.float64)
    way = -value.sign()[:, None] * (grad if norm is L2 else grad.sign())
    for _ in range(200):
        time = (low + high) / 2
        move = (x + time * way).clamp(0, 1) - x
        far = (value + (grad * move).sum(1)) * value.sign() < 0
        low, high = torch.where(far[:, None], low, time), torch.where(far[:, None], time, high)
    return (x + high * way).clamp(0, 1) - x


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.25, 2.75)])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_it_is_the_smallest_move_to_the_plane(norm, bounds, sign):
    """The same question in any box: positions and moves grow with it, slopes shrink."""
    low, width = bounds[0], bounds[1] - bounds[0]
    unit, grad = dice(50, 12), dice(50, 12, seed=1) * 4 - 2
    unit[:, 0], unit[:, 1] = 0, 1  # at the bounds
    reach = (grad.abs() * torch.where(sign * grad > 0, unit, 1 - unit)).sum(1)  # what the box allows against the slope
    value = sign * torch.linspace(0.05, 0.9, 50, dtype=torch.float64) * reach
    x = low + width * unit
    ours = project_to_hyperplane(norm(0.1, bounds=bounds), x, grad / width, value)
    torch.testing.assert_close(ours / width, bisected(norm, unit, grad, value), rtol=1e-4, atol=2e-4)
    assert (value + (grad / width * ours).sum(1)).abs().max() < 1e-3 * value.abs().max()
    assert ((x + ours >= low - 1e-12) & (x + ours <= bounds[1] + 1e-12)).all()
    assert (((x + ours - low).abs() < 1e-12) | ((x + ours - bounds[1]).abs() < 1e-12)).any()  # the box is met


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_tiny_and_huge_slopes_are_as_good_as_others(norm, scale, bounds):
    """Their squares are no float32 numbers."""
    x, grad, value = torch.full((1, 2), 0.5), torch.tensor([[3.0, -4.0]]), torch.tensor([1.0])
    ours = project_to_hyperplane(norm(0.1, bounds=bounds), x, scale * grad, scale * value)
    torch.testing.assert_close(ours, project_to_hyperplane(norm(0.1, bounds=bounds), x, grad, value))
    assert ours.abs().min() > 0.05


def test_how_far_a_move_goes():
    move = torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]])
    assert far(L2(0.1), move).tolist() == [5.0, 0.0]
    assert far(Linf(0.1), move).tolist() == [4.0, 0.0]


@pytest.mark.parametrize(("norm", "move"), [(L2, [-1.2, 1.6]), (Linf, [-10 / 7, 10 / 7])])
def test_without_a_box_it_is_the_dual_direction(norm, move):
    """From a value of 10 with slopes (3, -4): 10 / 25 of the slopes, or 10 / 7 against each sign."""
    x, grad = torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])
    ours = project_to_hyperplane(norm(0.1, bounds=None), x, grad, torch.tensor([10.0]))
    torch.testing.assert_close(ours, torch.tensor([move]))
    back = project_to_hyperplane(norm(0.1, bounds=None), x, grad, torch.tensor([-10.0]))
    torch.testing.assert_close(back, -ours)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_where_the_box_has_too_little_room_all_of_it_is_used(norm):
    x, grad = torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[1.0, -2.0, 0.0]])
    ours = project_to_hyperplane(norm(0.1), x, grad, torch.tensor([5.0]))
    torch.testing.assert_close(ours, torch.tensor([[-0.2, 0.1, 0.0]]))


def test_nothing_moves_at_the_plane_or_without_a_slope():
    x = torch.tensor([[0.2, 0.9], [0.2, 0.9]])
    ours = project_to_hyperplane(L2(0.1), x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert torch.equal(ours, torch.zeros(2, 2))
