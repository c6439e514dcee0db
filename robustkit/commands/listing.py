"""`robustkit bench --list`: the names that may be written on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console
from rich.text import Text

from robustkit import data, zoo
from robustkit.attack import Attack
from robustkit.bench.plan import defence_specs as defences
from robustkit.bench.plan import model_specs as models
from robustkit.bench.plan import specs
from robustkit.bench.plan.plan import NONE
from robustkit.errors import ArgumentError

__all__ = ["list_command"]


def list_command() -> None:
    """Print models, data, defences, threats, attacks with their fields and defaults, and goals.

    Attacks of other packages are loaded for that; what is wrong with one goes to standard error, in one line.
    """
    screen = Console()
    with redirect_stdout(sys.stderr):  # what a package prints is not the answer
        names = _names()
    for title, lines in names.items():
        screen.print(Text(title, "bold"))
        for line in lines:
            screen.print(Text(f"  {line}"), soft_wrap=True)


def _names() -> dict[str, list[str]]:
    return {
        "models": [*(f"zoo:{name}" for name in zoo.names()), *models.FORMS[1:]],
        "data": list(data.FORMS),
        "defences": [
            *(name if name == NONE else f"{name}:{_fields(name)}" for name in (NONE, *defences.DEFENCES)),
            *defences.FORMS[-2:],
        ],
        "threats": [example for *_, example in specs.THREATS],
        "attacks": [*(_attack(name, *told) for name, told in specs.attack_names().items()), *_theirs()],
        "goals": list(specs.GOALS),
    }


def _fields(name: str) -> str:
    return ",".join(f"{field}={value}" for field, value in defences.settable(name).items())


def _theirs() -> Iterator[str]:
    for name, plugin in specs.plugins().items():
        try:
            yield _attack(name, plugin.load(), {}, "of " + " ".join(plugin.packages[0]))
        except ArgumentError as error:
            print(f"robustkit: {error}", file=sys.stderr)


def _attack(name: str, cls: type[Attack], preset: Mapping[str, Any], *more: str) -> str:
    """A name with its fields as they stand when nothing is said, what it sees, and the threats that it serves."""
    told = ",".join(f"{field}={value}" for field, value in specs.settable(cls, preset).items())
    universal = ["one change for all images"] if cls.universal else []
    return f"{name}:{told}".rstrip(":") + f"  ({'; '.join([cls.access, specs.served(cls), *universal, *more])})"
