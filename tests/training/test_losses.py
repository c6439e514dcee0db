"""Each training loss equals a hand-written loop."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robustkit._engine.noise import Noise
from robustkit.attacks import FGSM, PGD
from robustkit.threats import L2, Linf
from robustkit.training import madry, standard

X = torch.rand(7, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(7) % 3


def net():
    """Return a net with batch norm, so that the training flag matters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def by_hand(model, x, y, eps, steps, seed):
    """Projected gradient descent in the Linf ball from the same random start, in evaluation mode."""
    start = Noise(seed, torch.arange(len(x))).at("start", 0)
    x_adv = Linf(eps).sample(x, start)
    model.eval()
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
        x_adv = x_adv.detach() + 2.5 / steps * eps * grad.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps).clamp(0, 1)
    model.train()
    return cross_entropy(model(x_adv), y)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_madry_equals_a_hand_written_loop():
    ours, theirs = net().train(), net().train()
    loss = madry(ours, X, Y, attack=PGD(steps=4), threat=Linf(0.2), seed=5)
    expected = by_hand(theirs, X, Y, 0.2, 4, seed=5)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours, loss), gradients(theirs, expected), rtol=1e-5, atol=1e-6)
    # one pass in training mode updates the running statistics, the passes of the attack do not
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_madry_is_the_loss_on_adversarial_examples_in_the_models_current_mode():
    for mode in (True, False):
        model = net().train(mode)
        x_adv = FGSM().perturb(model, X, Y, threat=L2(1.0))
        loss = madry(model, X, Y, attack=FGSM(), threat=L2(1.0))
        assert model.training is mode
        assert torch.equal(loss, cross_entropy(net().train(mode)(x_adv), Y))


def test_the_seed_determines_the_random_start():
    model = net().eval()
    losses = [madry(model, X, Y, attack=PGD(steps=1, reach=0.1), threat=Linf(0.2), seed=seed) for seed in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]


def test_standard_is_the_mean_cross_entropy():
    model = net().eval()
    expected = -model(X).double().log_softmax(1)[torch.arange(7), Y].mean()
    torch.testing.assert_close(standard(model, X, Y).double(), expected, rtol=1e-6, atol=1e-6)
