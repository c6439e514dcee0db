"""`robustkit bench --list`: the names that the command line accepts."""

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

    Attacks of other packages are loaded for this; an error in one goes to standard error, in one line.
    """
    screen = Console()
    with redirect_stdout(sys.stderr):  # standard output is for the list alone
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
        "attacks": [
            *(_attack(name, cls, preset) for name, (cls, preset) in specs.attack_registry().items()),
            *_plugin_attacks(),
        ],
        "goals": list(specs.GOALS),
    }


def _fields(name: str) -> str:
    return ",".join(f"{field}={value}" for field, value in defences.settable_fields(name).items())


def _plugin_attacks() -> Iterator[str]:
    for name, plugin in specs.plugins().items():
        try:
            yield _attack(name, plugin.load(), {}, "of " + " ".join(plugin.packages[0]))
        except ArgumentError as error:
            print(f"robustkit: {error}", file=sys.stderr)


def _attack(name: str, cls: type[Attack], preset: Mapping[str, Any], *more: str) -> str:
    """A name with its fields and defaults, its access to the model, and the threats that it supports."""
    fields = ",".join(f"{field}={value}" for field, value in specs.settable_fields(cls, preset).items())
    universal = ["one perturbation for all images"] if cls.universal else []
    return f"{name}:{fields}".rstrip(":") + f"  ({'; '.join([cls.access, specs.served_threats(cls), *universal, *more])})"
