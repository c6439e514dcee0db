"""`robustkit bench --list`: the names that may be written on the command line."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.text import Text

from robustkit import data, zoo
from robustkit.bench import models, specs

__all__ = ["list_command"]


def list_command() -> None:
    """Print models, data, threats, attacks with their fields and defaults, and goals."""
    screen = Console()
    for title, lines in _names().items():
        screen.print(Text(title, "bold"))
        for line in lines:
            screen.print(Text(f"  {line}"), soft_wrap=True)


def _names() -> dict[str, list[str]]:
    return {
        "models": [*(f"zoo:{name}" for name in zoo.names()), *models.FORMS[1:]],
        "data": list(data.FORMS),
        "threats": [example for *_, example in specs.THREATS],
        "attacks": [_attack(name) for name in specs.attack_names()],
        "goals": list(specs.GOALS),
    }


def _attack(name: str) -> str:
    """A name with its fields as they stand when nothing is said."""
    attack = specs.attack(name)
    told = ",".join(f"{field.name}={getattr(attack, field.name)}" for field in fields(attack))  # type: ignore[arg-type]
    return f"{name}:{told}" if told else name
