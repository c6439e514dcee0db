"""The remaining time: exact if the blocks of each case cost the same, and unknown before every case has a finished block."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.bench.execution.forecast import Forecast


def test_each_case_has_its_own_time_per_image():
    forecast = Forecast([300, 300])
    forecast.add(0, 100, 1.0)
    assert forecast.seconds_left() is None
    forecast.add(1, 100, 50.0)
    assert forecast.seconds_left() == pytest.approx(200 * 0.01 + 200 * 0.5)
    forecast.add(1, 100, 70.0)  # the mean of its finished blocks
    assert forecast.seconds_left() == pytest.approx(200 * 0.01 + 100 * 0.6)


def test_the_time_is_divided_by_the_number_of_workers():
    forecast = Forecast([300], workers=4)
    forecast.add(0, 100, 8.0)
    assert forecast.seconds_left() == pytest.approx(4.0)


def test_overhead_outside_the_blocks_is_added():
    forecast = Forecast([400, 400], workers=2)
    forecast.add(0, 100, 1.0)  # from an earlier session, so without a clock time
    forecast.add(0, 100, 1.0, at=50.0)
    forecast.add(1, 100, 3.0, at=53.0)
    # Since the first block two workers had 3 seconds each for 3 seconds of work: an overhead of 3 seconds for 100 images.
    assert forecast.seconds_left() == pytest.approx((200 * 0.01 + 300 * 0.03 + 500 * 0.03) / 2)


def test_blocks_that_overlap_have_no_overhead():
    forecast = Forecast([400])
    forecast.add(0, 100, 1.0, at=50.0)
    forecast.add(0, 100, 1.0, at=50.1)
    assert forecast.seconds_left() == pytest.approx(2.0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.floats(0.001, 100)), min_size=1, max_size=5), st.integers(1, 8)
)
def test_it_is_exact_once_every_case_has_a_block_if_blocks_of_a_case_cost_the_same(cases, workers):
    """`cases` lists (blocks, images per block, seconds per block); the first block of each case comes before the others."""
    forecast = Forecast([blocks * images for blocks, images, _ in cases], workers)
    order = [(i, 0) for i in range(len(cases))] + [(i, b) for i, case in enumerate(cases) for b in range(1, case[0])]
    remaining = sum(blocks * seconds for blocks, _, seconds in cases)
    for number, (case, _) in enumerate(order, start=1):
        _, images, seconds = cases[case]
        forecast.add(case, images, seconds)
        remaining -= seconds
        estimate = forecast.seconds_left()
        assert (estimate is None) == (number < len(cases))
        if estimate is not None:
            assert estimate == pytest.approx(remaining / workers, abs=1e-6)
    assert forecast.seconds_left() == pytest.approx(0)
