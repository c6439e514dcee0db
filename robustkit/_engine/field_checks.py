"""The rules that the fields of attacks have to keep."""

from __future__ import annotations

import math

from robustkit.errors import ArgumentError

__all__ = ["at_least", "not_negative", "positive"]


def at_least(least: int, **fields: int) -> None:
    """Refuse anything but whole numbers from `least` on."""
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}={value!r} must be a whole number, at least {least}")


def positive(**fields: float | None) -> None:
    """Refuse numbers that are not above zero and finite; None means "not set"."""
    for name, value in fields.items():
        if value is not None and not (isinstance(value, float | int) and 0 < value < math.inf):
            raise ArgumentError(f"{name}={value!r} must be a finite number above zero")


def not_negative(**fields: float) -> None:
    """Refuse numbers that are below zero or not finite."""
    for name, value in fields.items():
        if not (isinstance(value, float | int) and 0 <= value < math.inf):
            raise ArgumentError(f"{name}={value!r} must be a number, at least zero")
