"""Checks of a model's outputs."""

import math

import pytest
import torch

from robustkit._engine.ledger import Check
from robustkit._engine.output_checks import (
    are_probabilities,
    check_final_output,
    check_first_output,
    non_finite_rows,
    predict_one,
)

SOUND = torch.tensor([[0.2, 0.3, 0.4], [1.0, -1.0, 0.0], [5.0, 0.0, 0.0], [0.25, 0.25, 0.5]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_found_in_tensors_and_tuples(value):
    out = SOUND.clone()
    out[2, 1] = value
    assert non_finite_rows(out).tolist() == [False, False, True, False]
    assert non_finite_rows((SOUND, out[:, 1])).tolist() == [False, False, True, False]
    assert non_finite_rows(out.reshape(4, 1, 3)).tolist() == [False, False, True, False]
    assert check_first_output(out)[0] == Check("undefined-outputs", 1, 4, 0.0)


def test_other_outputs_give_no_checks():
    assert not non_finite_rows(SOUND).any()
    for out in (None, "text", {"logits": SOUND}, torch.tensor(3.0), SOUND.long(), (SOUND, SOUND[:2])):
        assert not len(non_finite_rows(out))
        assert check_first_output(out) == []


def test_probabilities_are_rows_that_sum_to_one():
    """A row that sums to one by chance counts; a row with a negative entry does not."""
    assert are_probabilities(SOUND).tolist() == [False, False, False, True]
    assert are_probabilities(torch.tensor([[1.5, -0.5]])).tolist() == [False]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert are_probabilities((10 * torch.randn(50, 7)).softmax(1).to(dtype)).all()
    assert check_first_output(SOUND) == [Check("probabilities", 1, 4)]
    assert check_first_output(SOUND[:3]) == []


def test_ties_are_counted_in_the_final_output():
    assert check_final_output(SOUND, torch.tensor([True, False, True, False])) == [Check("tied-outputs", 2, 4, 0.01)]
    assert check_final_output(SOUND, torch.zeros(4, dtype=torch.bool)) == []
    assert check_final_output(SOUND / 0, torch.zeros(4, dtype=torch.bool)) == [Check("undefined-outputs", 4, 4, 0.0)]


def test_a_model_that_fails_on_a_batch_of_one_is_given_two_copies():
    def picky(x):
        if len(x) == 1:
            raise ValueError("one")
        return x + 1

    x = torch.rand(1, 2, 3)
    out, error = predict_one(picky, x)
    assert torch.equal(out, x + 1)
    assert str(error) == "one"
    out, _ = predict_one(lambda x: (picky(x), [0] * len(x)), x)
    assert torch.equal(out[0], x + 1)
    assert out[1] == [0]
    out, error = predict_one(lambda x: x + 2, x)
    assert torch.equal(out, x + 2)
    assert error is None


def test_a_model_that_fails_on_two_copies_raises_the_error_of_the_batch_of_one():
    def broken(x):
        raise ValueError(f"batch of {len(x)}")

    with pytest.raises(ValueError, match="batch of 1"):
        predict_one(broken, torch.rand(1, 2))
