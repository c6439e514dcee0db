import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit.errors import ShapeError
from robustkit.losses import cross_entropy, dlr, margin, probability_margin, targeted, targeted_dlr
from robustkit.testing.strategies import labels, logits

CASES = st.tuples(st.integers(1, 4), st.integers(2, 6)).flatmap(lambda s: st.tuples(logits(*s), labels(*s)))


def by_hand(name, z, y):
    """One example, in Python's own floats."""
    if name == "probability_margin":
        total = sum(math.exp(v - max(z)) for v in z)
        z = [math.exp(v - max(z)) / total for v in z]
    others = [v for i, v in enumerate(z) if i != y]
    if name == "cross_entropy":
        return math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[y]
    top = sorted(z, reverse=True)
    difference = max(others) - z[y]
    if "dlr" not in name or len(z) < 3:
        return difference
    second = top[2] if name == "dlr" else (top[1] + top[2]) / 2 if len(z) == 3 else (top[2] + top[3]) / 2
    return difference / (top[0] - second + 1e-12)


LOSSES = [cross_entropy, margin, dlr, targeted_dlr, probability_margin]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@given(case=CASES)
def test_rows_equal_a_slow_recomputation(loss, case):
    out, y = case[0].double(), case[1]
    slow = torch.tensor([by_hand(loss.__name__, z.tolist(), int(i)) for z, i in zip(out, y, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(loss(out, y), slow, rtol=1e-9, atol=1e-9)


@given(case=CASES)
def test_the_margin_is_positive_exactly_where_the_example_is_misclassified(case):
    out, y = case
    strict = margin(out, y) != 0
    assert torch.equal((margin(out, y) > 0)[strict], (out.argmax(1) != y)[strict])


@given(case=CASES, scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_dlr_is_invariant_to_scale_and_shift(case, scale, shift):
    out, y = case[0].double() * 1e3, case[1]
    clear = (out.topk(2, 1).values.diff(dim=1).abs() > 1e-6).squeeze(1) & (out.shape[1] > 2)
    torch.testing.assert_close(dlr(out * scale + shift, y)[clear], dlr(out, y)[clear], rtol=1e-4, atol=1e-6)


@given(case=CASES.filter(lambda case: case[0].shape[1] > 2))
def test_targeted_dlr_has_a_gradient_for_a_target_class_of_rank_three(case):
    """`dlr` itself has none there: for the class with the third-largest logit it is constant."""
    out = case[0].double().argsort(1).argsort(1).double()  # ranks, so that there are no ties
    for loss, has_gradient in ((targeted_dlr, True), (dlr, False)):
        z = out.clone().requires_grad_()
        third = out.topk(3, 1).indices[:, 2]
        (grad,) = torch.autograd.grad(loss(z, third).sum(), z)
        assert bool((grad.abs() > 1e-6).any(1).all()) is has_gradient
    assert [targeted(loss) for loss in LOSSES[:3]] == [cross_entropy, margin, targeted_dlr]


@pytest.mark.parametrize(
    ("out", "y", "words"),
    [
        ((torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64), "tuple"),
        (None, torch.zeros(2, dtype=torch.int64), "NoneType"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), "C >= 2"),
        (torch.zeros(2, 3, 1), torch.zeros(2, dtype=torch.int64), r"\(2, 3, 1\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3), torch.zeros(2), "float32"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"\(3,\)"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(out, y, words):
    for loss in LOSSES:
        with pytest.raises(ShapeError, match=words):
            loss(out, y)
