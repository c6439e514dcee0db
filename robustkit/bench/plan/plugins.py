"""Attacks of other installed packages, published under the entry-point group `robustkit.attacks`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, distribution, distributions
from inspect import isabstract
from typing import Any, final, get_args, get_type_hints

from robustkit._engine.state_guard import is_out_of_memory
from robustkit.attack import Attack
from robustkit.errors import ArgumentError, RobustkitError
from robustkit.threats import Threat

__all__ = ["GROUP", "Plugin", "blamed", "published"]

GROUP = "robustkit.attacks"


@final
@dataclass(frozen=True)
class Plugin:
    """An attack of another package, known by its name; none of its code has run yet.

    Attributes:
        name: Its name on the command line.
        packages: Who publishes it: names with versions; several where it cannot be used for that reason.
        entry: Where its class is.
        trouble: Why it cannot be used, as far as that is known without running its code; empty if it is not known.
    """

    name: str
    packages: tuple[tuple[str, str], ...]
    entry: EntryPoint | None
    trouble: str = ""

    def __str__(self) -> str:
        told = " and ".join(f"{name!r} {version}" for name, version in self.packages)
        return f"plugin {self.name!r} of {'package' if len(self.packages) == 1 else 'packages'} {told}"

    def load(self) -> type[Attack]:
        """Its class; this imports the package, so its code runs.

        Raises:
            ArgumentError: It cannot be used, in one line with the reason.
        """
        trouble = self.trouble
        if self.entry is not None and not trouble:
            try:
                value = self.entry.load()
                trouble = _wrong(value)
            except (Exception, SystemExit) as error:
                raise ArgumentError(
                    f"{self} was left out: {_told(error)}; install what it needs, repair it, or uninstall it"
                ) from error
            if not trouble:
                cls: type[Attack] = value
                return cls
        raise ArgumentError(f"{self} was left out: {trouble}")


def published(ours: Collection[str]) -> dict[str, Plugin]:
    """The attacks of other packages by name, sorted, those that cannot be used among them; no code of theirs is run.

    Args:
        ours: The names that are taken.
    """
    found: dict[str, list[Plugin]] = {}
    for plugin in _entries():
        found.setdefault(plugin.name, []).append(plugin)
    return {name: _settled(found[name], ours) for name in sorted(found)}


@contextmanager
def blamed(plugin: Plugin | None, spec: str) -> Iterator[None]:
    """Whatever the attack of another package raises, in one line that names the package; a defect of ours passes."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if plugin is None or isinstance(error, RobustkitError) or is_out_of_memory(error):
            raise
        raise ArgumentError(
            f"attack {spec!r}: {plugin} raised {_told(error)}; report it to its authors; --debug, with one worker, shows where"
        ) from error


def _entries() -> Iterator[Plugin]:
    """All that is published, package by package; of one that is there twice, by what is found first, as in imports."""
    names = set()
    for dist in distributions():
        with suppress(Exception):  # what an interrupted installation left is no package, and may have no name
            if GROUP in (dist.read_text("entry_points.txt") or ""):
                names.add(re.sub("[-_.]+", "-", dist.name).lower())
    for name in sorted(names):
        dist = distribution(name)
        packages = ((dist.name, dist.version),)
        try:  # not entry_points(), where one broken file of any package hides those of all
            entries = [entry for entry in dist.entry_points if entry.group == GROUP]
        except Exception as error:
            yield Plugin("*", packages, None, f"its entry_points.txt cannot be read ({_told(error)}); install it anew")
            continue
        for entry in entries:
            yield Plugin(entry.name, packages, entry, _unusable(entry))


def _unusable(entry: EntryPoint) -> str:
    """What is wrong with the words of an entry point; empty if nothing is."""
    if not re.fullmatch(r"\w[\w.-]*", entry.name):
        return "its name must be letters, digits, '-', '_' and '.', to be written on the command line; it needs another"
    if not re.fullmatch(r"[\w.]+\s*:\s*[\w.]+", entry.value):
        return f"{entry.value!r} must be package.module:Class"
    return ""


def _settled(plugins: list[Plugin], ours: Collection[str]) -> Plugin:
    """Those of one name as one: nobody takes a name of ours, and of two others neither, since nobody could say which."""
    first = replace(plugins[0], packages=tuple(sorted({package for plugin in plugins for package in plugin.packages})))
    if first.trouble:
        return first
    if first.name in ours:
        return replace(first, trouble="the name is that of an attack of robustkit, which keeps it; it needs another")
    if len(plugins) > 1:
        return replace(first, trouble="the name is published more than once, so nothing is used; uninstall all but one")
    return first


def _wrong(value: Any) -> str:  # Any: whatever the package published
    """What is wrong with a published attack; empty if nothing is."""
    rule = "; publish the class of an attack, a frozen dataclass derived from robustkit.attack.Attack"
    if not (isinstance(value, type) and issubclass(value, Attack)):
        return f"{value!r} is no class derived from Attack{rule}"
    if isabstract(value):
        return f"{value.__name__} does not define {', '.join(sorted(value.__abstractmethods__))}{rule}"
    if not getattr(getattr(value, "__dataclass_params__", None), "frozen", False):
        return f"{value.__name__} is no frozen dataclass{rule}"
    hints = get_type_hints(Attack)
    levels = get_args(get_args(hints["access"])[0])
    if value.access not in levels:
        return f"{value.__name__}.access={value.access!r} must be one of {', '.join(levels)}"
    serves: Any = value.serves
    if not (isinstance(serves, tuple) and all(isinstance(kind, type) and issubclass(kind, Threat) for kind in serves)):
        return f"{value.__name__}.serves={serves!r} must be a tuple of threats: (Linf, L2)"
    get_type_hints(value)  # by which its fields are read; raises where a name is not there
    return ""


def _told(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
