"""What the answers of a model show by themselves."""

import math

import pytest
import torch

from robustkit._engine.ledger import Evidence
from robustkit._engine.output_checks import are_probabilities, asked_alone, first_look, last_look, undefined

SOUND = torch.tensor([[0.2, 0.3, 0.4], [1.0, -1.0, 0.0], [5.0, 0.0, 0.0], [0.25, 0.25, 0.5]])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_hold_no_finite_number_are_found_in_tensors_and_in_pairs(value):
    out = SOUND.clone()
    out[2, 1] = value
    assert undefined(out).tolist() == [False, False, True, False]
    assert undefined((SOUND, out[:, 1])).tolist() == [False, False, True, False]
    assert undefined(out.reshape(4, 1, 3)).tolist() == [False, False, True, False]
    assert first_look(out)[0] == Evidence("undefined-outputs", 1, 4, 0.0)


def test_nothing_is_said_of_what_has_no_numbers_or_no_rows():
    assert not undefined(SOUND).any()
    for out in (None, "text", {"logits": SOUND}, torch.tensor(3.0), SOUND.long(), (SOUND, SOUND[:2])):
        assert not len(undefined(out))
        assert first_look(out) == []


def test_probabilities_are_rows_that_sum_to_one():
    """Two numbers that happen to sum to one are some; a row that holds a negative number is none."""
    assert are_probabilities(SOUND).tolist() == [False, False, False, True]
    assert are_probabilities(torch.tensor([[1.5, -0.5]])).tolist() == [False]
    for kind in (torch.float32, torch.float16, torch.bfloat16):
        assert are_probabilities((10 * torch.randn(50, 7)).softmax(1).to(kind)).all()
    assert first_look(SOUND) == [Evidence("probabilities", 1, 4)]
    assert first_look(SOUND[:3]) == []


def test_ties_that_decide_are_counted_at_the_end():
    assert last_look(SOUND, torch.tensor([True, False, True, False])) == [Evidence("tied-outputs", 2, 4, 0.01)]
    assert last_look(SOUND, torch.zeros(4, dtype=torch.bool)) == []
    assert last_look(SOUND / 0, torch.zeros(4, dtype=torch.bool)) == [Evidence("undefined-outputs", 4, 4, 0.0)]


def test_a_model_that_fails_on_one_is_asked_about_two():
    def picky(x):
        if len(x) == 1:
            raise ValueError("one")
        return x + 1

    x = torch.rand(1, 2, 3)
    out, error = asked_alone(picky, x)
    assert torch.equal(out, x + 1)
    assert str(error) == "one"
    out, _ = asked_alone(lambda x: (picky(x), [0] * len(x)), x)
    assert torch.equal(out[0], x + 1)
    assert out[1] == [0]
    out, error = asked_alone(lambda x: x + 2, x)
    assert torch.equal(out, x + 2)
    assert error is None


def test_a_model_that_fails_on_two_as_well_raises_what_it_raised_on_one():
    def broken(x):
        raise ValueError(f"batch of {len(x)}")

    with pytest.raises(ValueError, match="batch of 1"):
        asked_alone(broken, torch.rand(1, 2))
