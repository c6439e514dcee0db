"""The training loop equals a hand-written one bit for bit, and restores all state."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from robustkit.attacks import PGD
from robustkit.errors import ArgumentError
from robustkit.threats import Linf
from robustkit.training import fit, madry, standard

X = torch.rand(22, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(22) % 3


def net():
    """Return a net with batch norm and dropout, so that training flags and the global generator matter."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(32, 3))


def batches(seed=3):
    return DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=torch.Generator().manual_seed(seed))


def make_optimizer(model):
    optimizer = Adam(model.parameters())
    return optimizer, OneCycleLR(optimizer, 1e-2, total_steps=9)


def by_hand(model, loader, loss, epochs):
    optimizer, schedule = make_optimizer(model)
    history, step = [], 0
    for _ in range(epochs):
        losses, correct = [], 0
        for x, y in loader:
            model.eval()
            with torch.no_grad():
                correct += int((model(x).argmax(1) == y).sum())
            model.train()
            optimizer.zero_grad()
            value = loss(model, x, y, step)
            value.backward()
            optimizer.step()
            schedule.step()
            losses += [value.item()] * len(x)
            step += 1
        history.append((sum(losses) / len(losses), correct / len(losses)))
    return history


LOSSES = {
    "standard": (standard, lambda model, x, y, step: cross_entropy(model(x), y)),
    "madry": (
        partial(madry, attack=PGD(steps=2), threat=Linf(0.1)),
        lambda model, x, y, step: cross_entropy(
            model(PGD(steps=2).perturb(model, x, y, threat=Linf(0.1), seed=(7 << 32) + step)), y
        ),
    ),
}


@pytest.mark.parametrize(("loss", "same_by_hand"), LOSSES.values(), ids=LOSSES)
def test_fit_equals_a_hand_written_loop_bit_for_bit(loss, same_by_hand):
    ours, theirs = net(), net()
    torch.manual_seed(2)
    expected = by_hand(theirs, batches(), same_by_hand, epochs=3)
    torch.manual_seed(2)
    optimizer, schedule = make_optimizer(ours)
    history = fit(ours, batches(), loss=loss, optimizer=optimizer, epochs=3, schedule=schedule, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert [epoch.accuracy for epoch in history] == [accuracy for _, accuracy in expected]
    assert [epoch.loss for epoch in history] == pytest.approx([loss for loss, _ in expected], rel=1e-12)
    assert [epoch.examples for epoch in history] == [22, 22, 22]


def test_no_two_steps_and_no_two_runs_share_a_seed():
    seen = []

    def spy(model, x, y, seed):
        seen.append(seed)
        return standard(model, x, y)

    for seed in (0, 1, -1):
        model = net()
        fit(model, batches(), loss=spy, optimizer=SGD(model.parameters()), epochs=4, seed=seed)
    assert len(seen) == len(set(seen)) == 3 * 4 * 3


def test_training_flags_are_restored_also_after_an_error():
    model = net()
    model[1].eval()
    before = [part.training for part in model.modules()]
    during = []

    def spy(model, x, y):
        during.append([part.training for part in model.modules()])
        return standard(model, x, y)

    fit(model, [(X, Y)], loss=spy, optimizer=SGD(model.parameters()), epochs=1)
    assert all(during[0])
    assert [part.training for part in model.modules()] == before

    def failing(model, x, y):
        raise KeyError("in the loss")

    with pytest.raises(KeyError):
        fit(model, [(X, Y)], loss=failing, optimizer=SGD(model.parameters()), epochs=1)
    assert [part.training for part in model.modules()] == before


def test_frozen_parameters_stay_frozen_and_unchanged():
    model = net()
    model[0].requires_grad_(False)
    weight = model[0].weight.clone()
    fit(model, batches(), loss=standard, optimizer=SGD(model[5].parameters(), lr=0.1), epochs=1)
    assert torch.equal(model[0].weight, weight)
    assert not model[0].weight.requires_grad


def test_other_models_than_classifiers_have_no_accuracy():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16))

    def rebuild(model, x, y):
        return mse_loss(model(x), y.flatten(1))

    history = fit(model, [(X, X)], loss=rebuild, optimizer=SGD(model.parameters(), lr=0.5), epochs=20)
    assert all(epoch.accuracy != epoch.accuracy for epoch in history)
    assert [epoch.loss for epoch in history] == sorted((epoch.loss for epoch in history), reverse=True)


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_epochs_must_be_a_whole_number_above_zero(epochs):
    model = net()
    with pytest.raises(ArgumentError, match="epochs="):
        fit(model, batches(), loss=standard, optimizer=SGD(model.parameters()), epochs=epochs)


def test_an_exhausted_loader_is_refused():
    model = net()
    with pytest.raises(ArgumentError, match="loader gave no batch"):
        fit(model, iter([(X, Y)]), loss=standard, optimizer=SGD(model.parameters()), epochs=2)
