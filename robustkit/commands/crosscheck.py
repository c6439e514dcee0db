"""`robustkit crosscheck`: compare our attacks with those of other libraries, image by image."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from robustkit import data as real_data
from robustkit.bench.execution.model_under_test import load_model_under_test
from robustkit.bench.plan.plan import Case, Plan
from robustkit.data import Data
from robustkit.interop.crosscheck import (
    autoattack_version,
    compare_with_autoattack,
    comparison_table,
    crosscheck,
    format_autoattack_comparisons,
    library_versions,
    why_unsupported,
)
from robustkit.interop.peers import load_foolbox
from robustkit.threats import L2, Linf

__all__ = ["AUTOATTACK", "crosscheck_command"]

# Number of images for AutoAttack by default. It makes about 10,000 passes for a robust image, whatever the model; comparing
# with one library makes about 2,700 for each of 256 images. With 16 images, AutoAttack adds at most half to that.
AUTOATTACK = 16
_THREATS = (Linf(0.1), L2(1.0))


def crosscheck_command(model: str, data: str, limit: int, autoattack: int = AUTOATTACK) -> int:
    """Compare with the other installed libraries and print the table.

    Args:
        model: As for the bench.
        data: As for the bench.
        limit: The largest number of images.
        autoattack: The largest number of images for AutoAttack, if it is installed; 0 for none.

    Returns:
        The exit code: 0 if all attacks agree or differ for a known reason, else 1.

    Raises:
        MissingExtraError: There is no library to compare with.
    """
    versions = library_versions()
    missing = [name for name, version in versions.items() if version is None]
    if len(missing) == len(versions):
        load_foolbox()  # says how to install it
    plan = Plan((Case(model, "linf:0.1", "pgd"),), data, limit=limit)
    part = real_data.load(data).part(0, limit)
    target = load_model_under_test(model, part, plan).target
    assert target.module is not None
    rows, screen = crosscheck(target.module, part.x, part.y), Console()
    screen.print(comparison_table(rows))
    not_weaker = _run_autoattack(target.module, part, min(autoattack, len(part)), screen) if autoattack else True
    missing += [] if autoattack_version() else ["autoattack"]
    if missing:
        screen.print(f"not installed, so not compared: {', '.join(missing)}", highlight=False)
    return 0 if not_weaker and all(row.ok for row in rows) else 1


def _run_autoattack(model: nn.Module, part: Data, limit: int, screen: Console) -> bool:
    """Print which of the first `limit` images AutoAttack and `Standard` solve; return whether ours is not weaker."""
    if autoattack_version() is None:
        return True
    x, y = part.x[:limit], part.y[:limit]
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    reasons = [reason for threat in _THREATS if (reason := why_unsupported(x, classes, threat)) is not None]
    if reasons:
        screen.print(f"AutoAttack was not run: {reasons[0]}", highlight=False)
        return True
    comparisons = [compare_with_autoattack(model, x, y, threat) for threat in _THREATS]
    screen.print(format_autoattack_comparisons(comparisons))
    return all(comparison.ok for comparison in comparisons)
