"""Checks of numeric arguments. Each error names the argument, the value and the rule."""

from __future__ import annotations

import math

from robustkit.errors import ArgumentError

__all__ = ["at_least", "not_negative", "positive", "positive_or_none"]


def at_least(least: int, most: int | None = None, /, **fields: int) -> None:
    """Check that integers are at least `least`, and at most `most` where it is given.

    Raises:
        ArgumentError: A value is not an integer (a bool is not one) or is out of range.
    """
    for name, value in fields.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < least or (most is not None and value > most):
            rule = f", at least {least}" if most is None else f" from {least} to {most}"
            raise ArgumentError(f"{name}={value!r} must be a whole number{rule}")


def positive(**fields: float) -> None:
    """Check that numbers are finite and above zero.

    Raises:
        ArgumentError: A value is not a number (a bool is not one) or is out of range.
    """
    for name, value in fields.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ArgumentError(f"{name}={value!r} must be a finite number above zero")


def positive_or_none(**fields: float | None) -> None:
    """Check that numbers are finite and above zero; None means that the argument is not set.

    Raises:
        ArgumentError: A value is not a number (a bool is not one) or is out of range.
    """
    positive(**{name: value for name, value in fields.items() if value is not None})


def not_negative(**fields: float) -> None:
    """Check that numbers are finite and at least zero.

    Raises:
        ArgumentError: A value is not a number (a bool is not one) or is out of range.
    """
    for name, value in fields.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ArgumentError(f"{name}={value!r} must be a finite number, at least zero")


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
