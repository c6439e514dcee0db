"""McNemar's exact test and Holm's adjustment against closed forms, published figures and brute force."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.bench.statistics.paired_tests import holm, mcnemar


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(0, 5, 0.0625), (5, 0, 0.0625), (0, 0, 1.0), (3, 3, 1.0), (0, 1, 1.0), (0, 6, 1 / 32)]
)
def test_p_in_closed_form(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, rel=1e-12)


@pytest.mark.parametrize(("only_a", "only_b"), [(a, b) for a in range(6) for b in range(6)])
def test_p_is_that_of_the_exact_permutation_test(only_a, only_b):
    swaps = [abs(sum(signs)) for signs in itertools.product((-1, 1), repeat=only_a + only_b)]
    by_enumeration = sum(swapped >= abs(only_b - only_a) for swapped in swaps) / len(swaps)
    assert mcnemar(only_a, only_b) == pytest.approx(by_enumeration, rel=1e-12)


# Fagerland, Lydersen, Laake 2014 (Stat. Med. 33:2850), tables of Bentur 2009 and Cavo 2012, whose difference is
# n12 - n21: its digits in print, and those of the R package of the authors.
@pytest.mark.parametrize(("n12", "n21", "p", "digits"), [(1, 7, 0.0703, 5e-4), (6, 16, 0.052479, 5e-5)])
def test_published_p_values(n12, n21, p, digits):
    assert mcnemar(n21, n12) == pytest.approx(p, abs=digits)


def test_holm_in_closed_form():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.5]) == (1.0, 1.0)
    assert holm([0.2]) == (0.2,)
    assert holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.01, 0.99))
def test_holm_rejects_the_same_hypotheses_as_the_step_down_procedure(p, level):
    rejected, adjusted = set(), holm(p)
    for step, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[index] * (len(p) - step) > level:
            break
        rejected.add(index)
    assert {i for i, value in enumerate(adjusted) if value <= level} == rejected
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
