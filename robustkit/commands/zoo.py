"""`robustkit zoo list | train | verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustkit import zoo

__all__ = ["list_command", "train_command", "verify_command"]


def list_command() -> None:
    """Print a table of the shipped models."""
    view = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("model", "weights", "data", "images", "clean", "robust", "under"):
        right = heading in ("weights", "images", "clean", "robust")
        view.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=heading != "under")
    for name in zoo.names():
        card = zoo.card(name)
        scores = card.scores
        view.add_row(
            f"zoo:{name}",
            f"{card.parameters:,}",
            scores.data,
            f"{scores.n:,}",
            f"{scores.clean_accuracy:.1%}",
            f"{scores.robust_accuracy:.1%}",
            scores.threat.partition(", bounds")[0] + ")",
        )
    screen = Console()
    screen.print(view)
    screen.print(Text(f"robust: by {scores.attack}, an upper bound on the truth"))


def train_command(name: str, folder: Path) -> None:
    """Train a reference model, write its weights and card, and print its scores."""
    card = zoo.train(name, folder)
    line = f"{folder / name}.safetensors: {card.scores.clean_accuracy:.1%} clean, {card.training_s} s"
    Console().print(Text(line), soft_wrap=True)


def verify_command(names: Sequence[str] | None) -> int:
    """Print the differences from the cards; returns 0 if there are none, else 1."""
    screen, failed = Console(), 0
    for name in names or zoo.names():
        differences = zoo.verify(name)
        failed |= bool(differences)
        for line in differences or (f"zoo:{name} agrees with its card",):
            screen.print(Text(line), soft_wrap=True)
    return int(failed)
