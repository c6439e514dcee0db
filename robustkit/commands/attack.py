"""`robustkit attack`: one attack, and the images that it made."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from robustkit.bench.loaded import load
from robustkit.bench.plan import Plan
from robustkit.bench.runner import outcomes
from robustkit.bench.show.live import Live
from robustkit.bench.show.table import table
from robustkit.bench.store import Memory, replace_file
from robustkit.errors import ArgumentError

__all__ = ["attack_command"]


def attack_command(plan: Plan, out: Path) -> None:
    """Run the one case of `plan` and write an npz file that `--data npz:FILE` reads.

    It holds x, the attacked images, (N, C, H, W) float32; y, their true classes, (N,); success, (N,) bool; size, how much
    of the budget each change takes, (N,) float64; index, which example of the data each is, (N,).

    Raises:
        ArgumentError: The file exists or cannot be written, or the plan means nothing.
    """
    if out.suffix != ".npz":
        raise ArgumentError(f"out={str(out)!r} must end in .npz: the images are written as arrays x and y")
    if out.exists():
        raise ArgumentError(f"out={str(out)!r} exists; nothing is overwritten: name a new file")
    store, loaded = Memory(), load(plan)
    with Live(Console(stderr=True), loaded, 1) as live:
        (outcome,) = outcomes(loaded, store, progress=live.progress)
    blocks = sorted(store.blocks.values(), key=lambda block: block.task.first)
    x, success, size = (
        torch.cat([getattr(block.result, name) for block in blocks]).cpu().numpy() for name in ("x_adv", "success", "size")
    )
    y, index = (torch.cat([getattr(block, name) for block in blocks]).numpy() for name in ("labels", "ids"))
    file = io.BytesIO()
    np.savez(file, x=x, y=y, success=success, size=size, index=index)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, file.getvalue())
    except OSError as error:
        raise ArgumentError(f"out={str(out)!r} cannot be written ({error.strerror}); name another file") from error
    screen = Console()
    screen.print(table([outcome.record]))
    screen.print(Text(f"images: {out}"), soft_wrap=True)
