import math

import pytest

from robustkit._engine.field_checks import at_least, not_negative, positive, positive_or_none
from robustkit.errors import ArgumentError


@pytest.mark.parametrize("value", [0, 1.0, "1", True, None])
def test_at_least_refuses_other_types_and_smaller_integers(value):
    at_least(1, steps=1, most=7)
    with pytest.raises(ArgumentError, match=f"^steps={value!r} must be a whole number, at least 1$"):
        at_least(1, most=7, steps=value)


@pytest.mark.parametrize("value", [0, 101])
def test_at_least_has_an_upper_bound_where_one_is_given(value):
    at_least(1, 100, quality=100)
    with pytest.raises(ArgumentError, match=f"^quality={value} must be a whole number from 1 to 100$"):
        at_least(1, 100, quality=value)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "1", True])
def test_numbers_out_of_range_are_refused(value):
    for check, rule in ((positive, "above zero"), (positive_or_none, "above zero"), (not_negative, "at least zero")):
        check(decay=1, bias=0.5)
        with pytest.raises(ArgumentError, match=f"^decay={value!r} must be a finite number,? {rule}$"):
            check(bias=1.0, decay=value)


def test_zero_and_none():
    not_negative(decay=0)
    positive_or_none(decay=None)
    for value in (0, None):
        with pytest.raises(ArgumentError, match=f"^decay={value} must be a finite number above zero$"):
            positive(decay=value)
