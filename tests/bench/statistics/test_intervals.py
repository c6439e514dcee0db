"""Wilson's and Tango's intervals against closed forms, published figures, maximum likelihood and exact coverage."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial

from robustkit.bench.statistics.intervals import tango, wilson


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1000])
def test_wilsons_interval_in_closed_form(n):
    z = 1.959963984540054
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        centre, half_width = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
        low, high = wilson(k, n)
        assert (low, high) == pytest.approx((centre - half_width, centre + half_width), abs=1e-12)
        assert 0 <= low <= k / n <= high <= 1


# Fagerland, Lydersen, Laake 2014 (Stat. Med. 33:2850), tables of Bentur 2009 and Cavo 2012, whose difference is
# n12 - n21: its digits in print, and those of the R package of the authors.
@pytest.mark.parametrize(
    ("n12", "n21", "n", "low", "high", "digits"), [(1, 7, 21, -0.517, -0.026, 5e-4), (6, 16, 161, -0.1240, -0.0054, 5e-5)]
)
def test_published_intervals(n12, n21, n, low, high, digits):
    assert tango(n21, n12, n) == pytest.approx((low, high), abs=digits)


@pytest.mark.parametrize("n", [1, 2, 10, 1000])
def test_tangos_interval_in_closed_form_for_no_and_for_all_images_discordant(n):
    z2 = 1.959963984540054**2
    assert tango(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-12)
    assert tango(0, n, n)[1] == 1.0
    assert tango(n, 0, n)[0] == -1.0


def score(only_a, only_b, n, delta):
    """Tango's score statistic; its nuisance parameter is the maximum-likelihood estimate, found numerically."""

    def negative_log_likelihood(q):
        cells = ((only_b, q + delta), (only_a, q), (n - only_a - only_b, 1 - 2 * q - delta))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    candidates = [
        minimize_scalar(negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x,
        low,
        high,
    ]
    q = min(candidates, key=negative_log_likelihood)
    return (only_b - only_a - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("only_a", "only_b", "n"), [(0, 5, 5), (0, 1, 20), (3, 1, 12), (7, 1, 21), (4, 4, 8), (0, 9, 60)])
def test_tangos_interval_contains_exactly_the_differences_that_the_score_test_accepts(only_a, only_b, n):
    low, high = tango(only_a, only_b, n)
    assert -1 <= low < (only_b - only_a) / n <= high <= 1
    for delta in np.linspace(-0.999, 0.999, 401):
        if min(abs(delta - low), abs(delta - high)) > 1e-4:
            assert (abs(score(only_a, only_b, n, delta)) <= 1.959963984540054) == (low <= delta <= high), delta


# With few discordant images the coverage may be higher, but never much lower.
@pytest.mark.parametrize(
    ("shares", "max_coverage"),
    [((0.2, 0.1), 0.96), ((0.05, 0.05), 0.97), ((0.3, 0.02), 0.96), ((0.02, 0.0), 1), ((0.001, 0.001), 1)],
)
def test_the_coverage_of_tangos_interval_is_close_to_95_percent(shares, max_coverage):
    n, (p_a, p_b) = 60, shares
    covered = total = 0.0
    for only_a, only_b in ((i, j) for i in range(n + 1) for j in range(n + 1 - i)):
        weight = multinomial.pmf([only_a, only_b, n - only_a - only_b], n, [p_a, p_b, 1 - p_a - p_b])
        if weight > 1e-7:
            low, high = tango(only_a, only_b, n)
            covered, total = covered + weight * (low <= p_b - p_a <= high), total + weight
    assert total > 0.999
    assert 0.94 <= covered <= max_coverage
