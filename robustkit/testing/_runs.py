"""How the checks run hypothesis: one law after another, counting the cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from robustkit.errors import MissingExtraError

__all__ = ["holds"]


def holds(law: Callable[..., None], about: object, cases: Any, examples: int | None) -> int:  # Any: a strategy
    """Run `law(about, case)` on generated cases and return how many there were.

    Args:
        law: Raises AssertionError where it is violated; its docstring states it.
        about: What the law is about: an attack, a goal.
        cases: A hypothesis strategy.
        examples: How many cases at most; None takes the number of the active hypothesis profile.

    Raises:
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
        law(about, case)

    try:
        run()
    except Exception as failure:
        failure.add_note(f"{about} breaks the law {law.__name__}: {(law.__doc__ or '').splitlines()[0]}")
        raise
    return count
