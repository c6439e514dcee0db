"""Shows a run in a notebook: data in, an HTML fragment out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from robustkit.bench.reporting.page import render, summary

__all__ = ["fragment"]


def fragment(results: Mapping[str, Any]) -> str:
    """A run in short, for a notebook's `_repr_html_`: the answer, the table and the flags.

    It loads nothing, runs no script, has no ids, and styles only what is its own; colours are those of what it stands in.

    Args:
        results: The content of results.json.

    Returns:
        One HTML element, which may stand in any page and in several cells.
    """
    return render("notebook.html", summary(results))
