"""Run one law on cases that hypothesis generates, and count them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustkit.errors import MissingExtraError

__all__ = ["check_law"]


def check_law(law: Callable[..., None], subject: object, cases: Any, examples: int | None) -> int:  # Any: a strategy
    """Run `law(subject, case)` on generated cases and return their number.

    Args:
        law: Raises AssertionError if it is violated; the first line of its docstring states it.
        subject: The attack, threat, goal or defence under test.
        cases: A hypothesis strategy.
        examples: The largest number of cases; None uses that of the active hypothesis profile.

    Raises:
        AssertionError: The law is violated; a note names the law and the subject.
        MissingExtraError: hypothesis is not installed.
    """
    try:
        from hypothesis import HealthCheck, given, settings
    except ImportError as error:
        raise MissingExtraError("hypothesis", "testing", error) from error
    count = 0

    @settings(
        max_examples=examples or settings().max_examples,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: object) -> None:
        nonlocal count
        count += 1
        law(subject, case)

    try:
        run()
    except Exception as failure:
        failure.add_note(f"{subject} breaks the law {law.__name__}: {(law.__doc__ or '').splitlines()[0]}")
        raise
    return count
