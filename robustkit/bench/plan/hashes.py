"""Whether data, a model or a file still is what a plan was made with."""

from __future__ import annotations

import math
from collections.abc import Mapping

from robustkit.errors import ArgumentError

__all__ = ["check_hashes", "hash_matches"]


def hash_matches(actual: str, expected: str) -> bool:
    """Whether two entries of [hashes] agree: equal hashes, and numbers that differ by rounding at most.

    An entry is a hash, optionally followed by numbers, separated by spaces. If the expected entry has no numbers, only the
    hashes are compared.
    """
    (actual_hash, *actual_numbers), (expected_hash, *expected_numbers) = actual.split(), expected.split()
    if actual_hash != expected_hash or (expected_numbers and len(actual_numbers) != len(expected_numbers)):
        return False
    try:
        pairs = [(float(a), float(b)) for a, b in zip(actual_numbers, expected_numbers, strict=False)]
    except ValueError:
        return False
    scale = max([abs(b) for _, b in pairs if math.isfinite(b)], default=0.0)
    return all(a == b or abs(a - b) <= 1e-3 * scale or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def check_hashes(actual: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Compare the hashes of what was loaded with those of a plan, by spec; expected hashes of other specs are ignored.

    Raises:
        ArgumentError: A hash differs.
    """
    for spec, value in expected.items():
        if spec in actual and not hash_matches(actual[spec], value):
            raise ArgumentError(
                f"{spec!r} has the hash {actual[spec]}, but the plan was made with {value}: it has changed, or is not "
                "reproducible; restore it, or remove its line from [hashes] and begin a new run"
            )
