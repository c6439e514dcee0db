"""A run as an HTML fragment for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustkit.bench.reporting.page import render, summary

__all__ = ["fragment"]


def fragment(results: Mapping[str, Any]) -> str:
    """A summary of a run for a notebook's `_repr_html_`: robust accuracies, table and flags.

    It loads nothing, runs no script, has no ids, styles only its own elements, and inherits the colours of the notebook.

    Args:
        results: The content of results.json.

    Returns:
        One HTML element, which may occur several times in a page.
    """
    return render("notebook.html", summary(results))
