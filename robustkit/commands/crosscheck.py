"""`robustkit crosscheck`: the same attacks through other libraries, image by image."""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from robustkit import data as real_data
from robustkit.bench.execution.model_under_test import load_subject
from robustkit.bench.plan.plan import Case, Plan
from robustkit.data import Data
from robustkit.interop.crosscheck import autoattack_version, crosscheck, duel, duel_lines, peers, table, unserved
from robustkit.interop.peers import load_foolbox
from robustkit.threats import L2, Linf

__all__ = ["AUTOATTACK", "crosscheck_command"]

# Images that AutoAttack sees, unless told otherwise. It takes some 10,000 passes for an image that withstands it, whatever the
# model, and one library in all else here some 2,700 for each of 256 images: with so few it adds at most half to that.
AUTOATTACK = 16
_THREATS = (Linf(0.1), L2(1.0))


def crosscheck_command(model: str, data: str, limit: int, autoattack: int = AUTOATTACK) -> int:
    """Compare with the other installed libraries and print the table; 0 if all agree or are known not to, else 1.

    Args:
        model: As for the bench.
        data: As for the bench.
        limit: The most images.
        autoattack: The most of them that AutoAttack is run on, where it is installed; 0 for none.

    Raises:
        MissingExtraError: There is no library to compare with.
    """
    absent = [name for name, version in peers().items() if version is None]
    if len(absent) == len(peers()):
        load_foolbox()  # says how to install it
    plan = Plan((Case(model, "linf:0.1", "pgd"),), data, limit=limit)
    part = real_data.load(data).part(0, limit)
    target = load_subject(model, part, plan).target
    assert target.module is not None
    rows, screen = crosscheck(target.module, part.x, part.y), Console()
    screen.print(table(rows))
    told = _duels(target.module, part, min(autoattack, len(part)), screen) if autoattack else True
    absent += [] if autoattack_version() else ["autoattack"]
    if absent:
        screen.print(f"not installed, so not compared: {', '.join(absent)}", highlight=False)
    return 0 if told and all(row.ok for row in rows) else 1


def _duels(model: nn.Module, part: Data, limit: int, screen: Console) -> bool:
    """Print who solves which of the first `limit` images, AutoAttack or `Standard`; whether we solve no less."""
    if autoattack_version() is None:
        return True
    x, y = part.x[:limit], part.y[:limit]
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    reasons = [why for threat in _THREATS if (why := unserved(x, classes, threat)) is not None]
    if reasons:
        screen.print(f"AutoAttack was not run: {reasons[0]}", highlight=False)
        return True
    duels = [duel(model, x, y, threat) for threat in _THREATS]
    screen.print(duel_lines(duels))
    return all(one.ok for one in duels)
