"""Power and sample size against enumeration and simulation, and the advice of a dry run."""

import io

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest, multinomial

from robustkit.bench import Case
from robustkit.bench.execution.preview import Preview
from robustkit.bench.reporting.table import preview_table
from robustkit.bench.statistics.intervals import wilson
from robustkit.bench.statistics.paired_tests import mcnemar
from robustkit.bench.statistics.power import DISCORDANT, POWER, minimum_detectable_difference, power, sample_size


@pytest.mark.parametrize(("n", "difference", "discordant"), [(20, 0.3, 0.4), (25, 0.05, 0.1), (12, 0.8, 0.8), (24, 0.0, 0.5)])
def test_power_is_the_probability_of_all_outcomes_that_the_test_rejects(n, difference, discordant):
    shares = (discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant
    by_enumeration = sum(
        multinomial.pmf([only_b, only_a, n - only_a - only_b], n, shares)
        for only_a in range(n + 1)
        for only_b in range(n + 1 - only_a)
        if mcnemar(only_a, only_b) <= 0.05
    )
    assert power(n, difference, discordant) == pytest.approx(by_enumeration, abs=1e-7)


def test_power_is_at_most_5_percent_without_a_difference_and_1_for_a_certain_one():
    assert all(power(n, 0.0, 0.3) <= 0.05 for n in (10, 100, 1000))
    assert power(5, 1.0) == 0.0  # five of five are p = 0.0625
    assert power(6, 1.0) == pytest.approx(1.0)


def test_a_simulated_comparison_detects_the_minimum_detectable_difference_with_80_percent_power():
    n, rng = 400, np.random.default_rng(0)
    difference = minimum_detectable_difference(n)
    assert difference < DISCORDANT
    shares = (DISCORDANT + difference) / 2, (DISCORDANT - difference) / 2, 1 - DISCORDANT
    draws = rng.multinomial(n, shares, size=2000)
    rejected = np.mean([binomtest(int(b), int(a + b)).pvalue <= 0.05 for b, a, _ in draws])
    assert rejected == pytest.approx(POWER, abs=0.03)  # more than three standard errors


def test_more_images_detect_smaller_differences_and_half_the_difference_takes_about_four_times_as_many():
    differences = [minimum_detectable_difference(n) for n in (20, 100, 1000, 10_000)]
    assert differences == sorted(differences, reverse=True)
    assert [minimum_detectable_difference(n) for n in (1, 5)] == [None, None]
    for n in (1000, 10_000):
        assert sample_size(minimum_detectable_difference(n)) == pytest.approx(n, rel=0.03)
        assert 3.5 * n < sample_size(minimum_detectable_difference(n) / 2) < 4.3 * n


def advice(n):
    low, high = wilson(n // 2, n)
    screen = Console(width=300, file=io.StringIO(), color_system=None)
    screen.print(preview_table([Preview(Case("m", "linf:1", "pgd"), n, 4, 40, 40, 1.0, high - low)], 1))
    return " ".join(screen.file.getvalue().split())


def test_the_advice_of_a_dry_run_gives_the_interval_and_the_detectable_difference():
    low, high = wilson(500, 1000)
    text = advice(1000)
    assert f"at most {100 * (high - low):.1f} points wide, {50 * (high - low):.1f} to either side at 50 %" in text
    assert "interval (Wilson)" in text
    assert "over the choice of images; the rate itself is an upper bound on robustness" in text
    assert f"a difference of {100 * minimum_detectable_difference(1000):.1f} points with 80 % power" in text
    assert "if they differ on 10 % of the images" in text
    assert "Half of that difference would take 3,900 images." in text
    at_least_the_difference = f"differ on {100 * minimum_detectable_difference(20):.0f} % of the images"
    assert at_least_the_difference in advice(20)
    assert "Too few images to compare two models" in advice(5)
