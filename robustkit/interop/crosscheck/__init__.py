"""Compare our attacks with those of other libraries, image by image."""

from robustkit.interop.crosscheck.autoattack import (
    autoattack_version,
    compare_with_autoattack,
    format_autoattack_comparisons,
    why_unsupported,
)
from robustkit.interop.crosscheck.libraries import comparison_table, crosscheck, library_versions

__all__ = [
    "autoattack_version",
    "compare_with_autoattack",
    "comparison_table",
    "crosscheck",
    "format_autoattack_comparisons",
    "library_versions",
    "why_unsupported",
]
