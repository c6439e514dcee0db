"""The time left: known in closed form where every case has its price, unknown before, and never wrong about what is over."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustkit.bench.execution.forecast import Forecast


def test_each_case_is_counted_at_its_own_price():
    forecast = Forecast([300, 300])
    forecast.add(0, 100, 1.0)
    assert forecast.left() is None
    forecast.add(1, 100, 50.0)
    assert forecast.left() == pytest.approx(200 * 0.01 + 200 * 0.5)
    forecast.add(1, 100, 70.0)  # its price is the mean of what has been seen
    assert forecast.left() == pytest.approx(200 * 0.01 + 100 * 0.6)


def test_workers_share_the_time():
    forecast = Forecast([300], workers=4)
    forecast.add(0, 100, 8.0)
    assert forecast.left() == pytest.approx(4.0)


def test_what_goes_by_beside_the_blocks_is_counted_too():
    forecast = Forecast([400, 400], workers=2)
    forecast.add(0, 100, 1.0)  # found, so it says nothing of the clock
    forecast.add(0, 100, 1.0, at=50.0)
    forecast.add(1, 100, 3.0, at=53.0)
    # Since the first: 3 seconds of two workers for 3 seconds of work, so 3 seconds beside 100 images.
    assert forecast.left() == pytest.approx((200 * 0.01 + 300 * 0.03 + 500 * 0.03) / 2)


def test_blocks_that_overlap_owe_nothing():
    forecast = Forecast([400])
    forecast.add(0, 100, 1.0, at=50.0)
    forecast.add(0, 100, 1.0, at=50.1)
    assert forecast.left() == pytest.approx(2.0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20), st.floats(0.001, 100)), min_size=1, max_size=5), st.integers(1, 8)
)
def test_where_blocks_of_a_case_cost_the_same_it_is_exact_from_the_first_of_each_on(cases, workers):
    """Cases of (blocks, images a block, seconds a block), the first block of each before the others."""
    forecast = Forecast([blocks * images for blocks, images, _ in cases], workers)
    order = [(i, 0) for i in range(len(cases))] + [(i, b) for i, case in enumerate(cases) for b in range(1, case[0])]
    todo = sum(blocks * seconds for blocks, _, seconds in cases)
    for number, (case, _) in enumerate(order, start=1):
        _, images, seconds = cases[case]
        forecast.add(case, images, seconds)
        todo -= seconds
        told = forecast.left()
        assert (told is None) == (number < len(cases))
        if told is not None:
            assert told == pytest.approx(todo / workers, abs=1e-6)
    assert forecast.left() == pytest.approx(0)
