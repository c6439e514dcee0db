import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robustkit import ClassifyAs, Misclassify
from robustkit.errors import ShapeError
from robustkit.goals import least_likely
from robustkit.losses import cross_entropy, dlr, margin, targeted_dlr
from robustkit.testing.strategies import labels, logits

CASES = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(lambda s: st.tuples(logits(*s), labels(*s)))


@given(CASES)
def test_success_agrees_with_argmax_by_hand(case):
    out, y = case
    for z, i, untargeted, targeted in zip(out, y, Misclassify().success(out, y), ClassifyAs().success(out, y), strict=True):
        predicted = max(range(len(z)), key=lambda j: (float(z[j]), -j))
        assert bool(untargeted) == (predicted != int(i))
        assert bool(targeted) == (predicted == int(i))


@given(CASES)
def test_losses_are_the_surrogate_with_opposite_signs(case):
    assert torch.equal(Misclassify().loss(*case), -cross_entropy(*case))
    assert torch.equal(ClassifyAs().loss(*case), cross_entropy(*case))


@given(CASES)
def test_parts_are_all_other_classes_by_decreasing_logit(case):
    out, y = case
    parts = Misclassify().parts(out, y)
    assert all(isinstance(part, ClassifyAs) for part, _ in parts)
    targets = torch.stack([ref for _, ref in parts], 1)
    for z, i, row in zip(out, y, targets, strict=True):
        assert sorted([*row.tolist(), int(i)]) == list(range(len(z)))
        assert torch.equal(z[row], z[row].sort(descending=True).values)
    assert ClassifyAs().parts(out, y)[0][0] == ClassifyAs()


@given(CASES)
def test_with_surrogate_replaces_the_loss_of_a_goal_and_its_parts(case):
    assert Misclassify().with_surrogate_loss(margin) == Misclassify(margin)
    assert ClassifyAs().with_surrogate_loss(margin) == ClassifyAs(margin)
    assert ClassifyAs().with_surrogate_loss(dlr) == ClassifyAs(targeted_dlr)
    assert all(part == ClassifyAs(targeted_dlr) for part, _ in Misclassify().with_surrogate_loss(dlr).parts(*case))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_outputs_that_are_not_finite_count_as_wrong(value, column):
    """In the logit of the true class or of another one; also where argmax would return the true class."""
    out, y = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([0])
    assert (Misclassify().success(out, y).item(), ClassifyAs().success(out, y).item()) == (False, True)
    out[0, column] = value
    assert (Misclassify().success(out, y).item(), ClassifyAs().success(out, y).item()) == (True, False)


def test_a_tie_is_won_by_the_class_with_the_lowest_index():
    out = torch.tensor([[1.0, 1.0, 0.0]]).expand(3, 3)
    y = torch.arange(3)
    assert Misclassify().success(out, y).tolist() == [False, True, True]
    assert Misclassify().boundary_margin(out, y).tolist() == [0, 0, -1]  # zero at a tie


@pytest.mark.parametrize("bad", [-1, 3, 99])
def test_labels_out_of_range_are_refused(bad):
    for goal in (Misclassify(), ClassifyAs()):
        with pytest.raises(ShapeError, match=r"\[0, 3\)"):
            goal.check(torch.zeros(2, 3), torch.tensor([0, bad]))


def test_least_likely_is_the_smallest_logit_in_evaluation_mode():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    net = nn.Sequential(nn.Flatten(), linear, nn.Dropout(0.9)).train()
    x = torch.rand(7, 1, 2, 3)
    state = torch.get_rng_state()
    assert torch.equal(least_likely(net, x, batch_size=3), linear(x.flatten(1)).argmin(1))
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert least_likely(net, x[:0]).shape == (0,)


def test_repr():
    assert repr(Misclassify()) == "Misclassify()"
    assert repr(ClassifyAs(margin)) == "ClassifyAs(surrogate=margin)"
