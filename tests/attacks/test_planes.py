"""The nearest point on a plane inside a box, against bisection and by hand."""

import pytest
import torch

from robustkit import L2, Linf
from robustkit.attacks._planes import onto


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


@pytest.mark.parametrize("norm", [Linf, L2])
def test_it_is_the_smallest_move_to_the_plane(norm):
    x, grad = dice(50, 12), dice(50, 12, seed=1) * 4 - 2
    reach = (grad.abs() * torch.where(grad > 0, x, 1 - x)).sum(1)  # what the box allows against the slope
    value = torch.linspace(0.05, 0.9, 50, dtype=torch.float64) * reach
    ours = onto(norm(0.1), x, grad, value)
    torch.testing.assert_close(ours, bisected(norm, x, grad, value), rtol=1e-4, atol=1e-4)
    assert (value + (grad * ours).sum(1)).abs().max() < 1e-3 * value.max()
    assert ((x + ours >= -1e-12) & (x + ours <= 1 + 1e-12)).all()
    assert ((x + ours == 0) | (x + ours == 1)).any()  # the box is met


@pytest.mark.parametrize(("norm", "move"), [(L2, [-1.2, 1.6]), (Linf, [-10 / 7, 10 / 7])])
def test_without_a_box_it_is_the_dual_direction(norm, move):
    """From a value of 10 with slopes (3, -4): 10 / 25 of the slopes, or 10 / 7 against each sign."""
    x, grad = torch.zeros(1, 2), torch.tensor([[3.0, -4.0]])
    ours = onto(norm(0.1, bounds=None), x, grad, torch.tensor([10.0]))
    torch.testing.assert_close(ours, torch.tensor([move]))
    back = onto(norm(0.1, bounds=None), x, grad, torch.tensor([-10.0]))
    torch.testing.assert_close(back, -ours)


@pytest.mark.parametrize("norm", [Linf, L2])
def test_where_the_box_has_too_little_room_all_of_it_is_used(norm):
    x, grad = torch.tensor([[0.2, 0.9, 0.5]]), torch.tensor([[1.0, -2.0, 0.0]])
    ours = onto(norm(0.1), x, grad, torch.tensor([5.0]))
    torch.testing.assert_close(ours, torch.tensor([[-0.2, 0.1, 0.0]]))


def test_nothing_moves_at_the_plane_or_without_a_slope():
    x = torch.tensor([[0.2, 0.9], [0.2, 0.9]])
    ours = onto(L2(0.1), x, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert torch.equal(ours, torch.zeros(2, 2))
