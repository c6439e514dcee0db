import pytest
import torch
from torch import nn

from robustkit import MIFGSM, PGD, Linf
from robustkit.errors import ArgumentError

torch.manual_seed(0)
NET = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
X = torch.rand(9, 1, 8, 8)
Y = NET(X).argmax(1)


def test_mifgsm_equals_algorithm_1():
    """Dong et al., algorithm 1, one example at a time."""
    ours = MIFGSM(steps=6, decay=0.9)(NET, X, Y, threat=Linf(0.1), keep="last").x_adv
    for i in range(9):
        x, x_adv, momentum = X[i : i + 1], X[i : i + 1], 0.0
        for _ in range(6):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(NET(x_adv), Y[i : i + 1]), x_adv)
            momentum = 0.9 * momentum + grad / grad.abs().sum()
            x_adv = (x + (x_adv + 0.1 / 6 * momentum.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
        torch.testing.assert_close(ours[i : i + 1], x_adv.detach())


def test_with_zero_decay_it_is_iterative_fgsm():
    without_momentum = MIFGSM(steps=6, decay=0)(NET, X, Y, threat=Linf(0.1), keep="last").x_adv
    iterative_fgsm = PGD(steps=6, reach=1.0, random_start=False)(NET, X, Y, threat=Linf(0.1), keep="last").x_adv
    assert torch.equal(without_momentum, iterative_fgsm)


def test_invalid_fields_are_refused():
    with pytest.raises(ArgumentError, match="decay=-1"):
        MIFGSM(decay=-1)
