"""`robustkit attack`: run one attack and write its adversarial images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.plan.plan import Plan
from robustkit.bench.reporting.live import Live
from robustkit.bench.reporting.table import table
from robustkit.bench.results.store import Memory
from robustkit.commands._output import check_new, write_output

__all__ = ["attack_command"]


def attack_command(plan: Plan, out: Path) -> None:
    """Run the only case of `plan` and write an npz file that `--data npz:FILE` reads.

    The file has x, the adversarial images, (N, C, H, W) float32; y, the true classes, (N,); success, (N,) bool; size, the
    perturbation sizes in the norm of the threat, (N,) float64; index, the indices of the examples in the data, (N,).

    Raises:
        ArgumentError: The file exists or cannot be written, or the plan is invalid.
    """
    check_new(out, ".npz", ": the images are written as arrays x and y")
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
    write_output("out", out, file.getvalue())
    screen = Console()
    screen.print(table([outcome.record]))
    screen.print(Text(f"images: {out}"), soft_wrap=True)
