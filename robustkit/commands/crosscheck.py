"""`robustkit crosscheck`: the same attacks through other libraries, image by image."""

from __future__ import annotations

from rich.console import Console

from robustkit import data as real_data
from robustkit.bench.plan import Case, Plan
from robustkit.bench.subject import load_subject
from robustkit.interop._peers import load_foolbox
from robustkit.interop.crosscheck import crosscheck, peers, table

__all__ = ["crosscheck_command"]


def crosscheck_command(model: str, data: str, limit: int) -> int:
    """Compare with the other installed libraries and print the table; 0 if all agree or are known not to, else 1.

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
    if absent:
        screen.print(f"not installed, so not compared: {', '.join(absent)}", highlight=False)
    return 0 if all(row.ok for row in rows) else 1
