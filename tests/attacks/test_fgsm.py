import torch
from torch import nn

from robustkit import FGSM, ClassifyAs, Linf
from robustkit.goals import least_likely

torch.manual_seed(0)
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
X = torch.rand(9, 1, 4, 4)
Y = NET(X).argmax(1)


def cross_entropy_grad(y):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(nn.functional.cross_entropy(NET(x), y, reduction="sum"), x)[0]


def test_fgsm_equals_its_formula():
    """Goodfellow et al.: x + eps * sign(grad J(x, y)), clamped to the box."""
    formula = (X + 0.07 * cross_entropy_grad(Y).sign()).clamp(0, 1)
    assert torch.equal(FGSM()(NET, X, Y, threat=Linf(0.07), keep="last").x_adv, formula)


def test_targeted_fgsm_equals_its_formula():
    """Kurakin et al.: x - eps * sign(grad J(x, target)), with the least likely class as target."""
    target = least_likely(NET, X)
    formula = (X - 0.07 * cross_entropy_grad(target).sign()).clamp(0, 1)
    result = FGSM()(NET, X, target, goal=ClassifyAs(), threat=Linf(0.07), keep="last")
    assert torch.equal(result.x_adv, formula)
    assert torch.equal(result.success, NET(formula).argmax(1) == target)
