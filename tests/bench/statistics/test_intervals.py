"""Wilson's and Tango's intervals against closed forms, published figures, likelihoods and exact coverage."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial

from robustkit.bench.statistics.intervals import tango, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_the_interval_is_wilsons_closed_formula(n):
    z = 1.959963984540054
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        middle, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
        low, high = wilson(k, n)
        assert (low, high) == pytest.approx((middle - spread, middle + spread), abs=1e-12)
        assert 0 <= low <= k / n <= high <= 1


# Fagerland, Lydersen, Laake 2014 (Stat. Med. 33:2850), tables of Bentur 2009 and Cavo 2012, whose difference is
# n12 - n21: its digits in print, and those of the R package of the authors.
@pytest.mark.parametrize(
    ("n12", "n21", "n", "low", "high", "digits"), [(1, 7, 21, -0.517, -0.026, 5e-4), (6, 16, 161, -0.1240, -0.0054, 5e-5)]
)
def test_published_intervals(n12, n21, n, low, high, digits):
    assert tango(n21, n12, n) == pytest.approx((low, high), abs=digits)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_the_interval_in_closed_form_where_no_image_differs(n):
    z2 = 1.959963984540054**2
    assert tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-12)
    assert tango(0, n, n)[1] == 1.0
    assert tango(n, 0, n)[0] == -1.0


def score(only_a, only_b, n, delta):
    """Tango's score statistic, its one unknown found by a search for the largest likelihood."""

    def unlikely(q):
        cells = ((only_b, q + delta), (only_a, q), (n - only_a - only_b, 1 - 2 * q - delta))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    found = [minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x, low, high]
    q = min(found, key=unlikely)
    return (only_b - only_a - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(0, 5, 5), (0, 1, 20), (3, 1, 12), (7, 1, 21), (4, 4, 8), (0, 9, 60)])
def test_the_interval_holds_just_those_differences_that_the_score_does_not_reject(only_a, only_b, n):
    low, high = tango(only_a, only_b, n)
    assert -1 <= low < (only_b - only_a) / n <= high <= 1
    for delta in np.linspace(-0.999, 0.999, 401):
        if min(abs(delta - low), abs(delta - high)) > 1e-4:
            assert (abs(score(only_a, only_b, n, delta)) <= 1.959963984540054) == (low <= delta <= high), delta


# Where hardly any image differs it may cover more, but never much less.
@pytest.mark.parametrize(
    ("shares", "most"), [((0.2, 0.1), 0.96), ((0.05, 0.05), 0.97), ((0.3, 0.02), 0.96), ((0.02, 0.0), 1), ((0.001, 0.001), 1)]
)
def test_the_interval_covers_the_truth_in_nearly_95_of_100_cases(shares, most):
    n, (p_a, p_b) = 60, shares
    covered = total = 0.0
    for only_a, only_b in ((i, j) for i in range(n + 1) for j in range(n + 1 - i)):
        weight = multinomial.pmf([only_a, only_b, n - only_a - only_b], n, [p_a, p_b, 1 - p_a - p_b])
        if weight > 1e-7:
            low, high = tango(only_a, only_b, n)
            covered, total = covered + weight * (low <= p_b - p_a <= high), total + weight
    assert total > 0.999
    assert 0.94 <= covered <= most
