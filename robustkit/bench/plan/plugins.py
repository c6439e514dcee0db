"""Plugins: attacks that other installed packages provide through the entry-point group `robustkit.attacks`."""

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

__all__ = ["GROUP", "Plugin", "attribute_errors", "find_plugins"]

GROUP = "robustkit.attacks"


@final
@dataclass(frozen=True)
class Plugin:
    """An attack of another package. None of its code runs before `load`.

    Attributes:
        name: Its name on the command line.
        packages: The packages that provide it, as pairs (name, version). If there are several, it cannot be used.
        entry: The entry point of its class; None if it could not be read.
        problem: Why it cannot be used, as far as this is known without running its code; empty if no problem is known.
    """

    name: str
    packages: tuple[tuple[str, str], ...]
    entry: EntryPoint | None
    problem: str = ""

    def __str__(self) -> str:
        providers = " and ".join(f"{name!r} {version}" for name, version in self.packages)
        return f"plugin {self.name!r} of {'package' if len(self.packages) == 1 else 'packages'} {providers}"

    def load(self) -> type[Attack]:
        """Import the class of the attack; this runs code of the package.

        Raises:
            ArgumentError: It cannot be used; the message has the reason, in one line.
        """
        problem = self.problem
        if self.entry is not None and not problem:
            try:
                value = self.entry.load()
                problem = _class_problem(value)
            except (Exception, SystemExit) as error:
                raise ArgumentError(
                    f"{self} cannot be used: {_one_line(error)}; install what it needs, repair it, or uninstall it"
                ) from error
            if not problem:
                cls: type[Attack] = value
                return cls
        raise ArgumentError(f"{self} cannot be used: {problem}")


def find_plugins(reserved: Collection[str]) -> dict[str, Plugin]:
    """The plugins by name, sorted, including those that cannot be used. No code of theirs is run.

    Args:
        reserved: The names of the attacks of this package.
    """
    by_name: dict[str, list[Plugin]] = {}
    for plugin in _all_plugins():
        by_name.setdefault(plugin.name, []).append(plugin)
    return {name: _merge(by_name[name], reserved) for name in sorted(by_name)}


@contextmanager
def attribute_errors(plugin: Plugin | None, spec: str) -> Iterator[None]:
    """Raise exceptions of a plugin as ArgumentError with one line that names the package; without a plugin they pass."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if plugin is None or isinstance(error, RobustkitError) or is_out_of_memory(error):
            raise
        raise ArgumentError(
            f"attack {spec!r}: {plugin} raised {_one_line(error)}; report it to its authors; --debug, with one worker, shows "
            "where"
        ) from error


def _all_plugins() -> Iterator[Plugin]:
    """All plugins, package by package; of a package that is installed twice only the one that would be imported."""
    names = set()
    for dist in distributions():
        with suppress(Exception):  # an interrupted installation may leave metadata without a name
            if GROUP in (dist.read_text("entry_points.txt") or ""):
                names.add(re.sub("[-_.]+", "-", dist.name).lower())
    for name in sorted(names):
        dist = distribution(name)
        packages = ((dist.name, dist.version),)
        try:  # not entry_points(): it fails for all packages if the file of one is broken
            entries = [entry for entry in dist.entry_points if entry.group == GROUP]
        except Exception as error:
            yield Plugin("*", packages, None, f"its entry_points.txt cannot be read ({_one_line(error)}); install it again")
            continue
        for entry in entries:
            yield Plugin(entry.name, packages, entry, _entry_problem(entry))


def _entry_problem(entry: EntryPoint) -> str:
    """What is wrong with the name or the value of an entry point; empty if nothing is."""
    if not re.fullmatch(r"\w[\w.-]*", entry.name):
        return "its name may only have letters, digits, '-', '_' and '.', for the command line; rename it"
    if not re.fullmatch(r"[\w.]+\s*:\s*[\w.]+", entry.value):
        return f"{entry.value!r} must be package.module:Class"
    return ""


def _merge(plugins: list[Plugin], reserved: Collection[str]) -> Plugin:
    """Plugins of the same name as one. It cannot be used if there are several, or if an attack of this package has the name."""
    first = replace(plugins[0], packages=tuple(sorted({package for plugin in plugins for package in plugin.packages})))
    if first.problem:
        return first
    if first.name in reserved:
        return replace(first, problem="robustkit has an attack of this name; rename the plugin")
    if len(plugins) > 1:
        return replace(first, problem="several packages provide this name; uninstall all but one")
    return first


def _class_problem(value: Any) -> str:  # Any: whatever the entry point names
    """What is wrong with the class of a plugin; empty if nothing is."""
    rule = "; the entry point must name a class derived from robustkit.attack.Attack, a frozen dataclass"
    if not (isinstance(value, type) and issubclass(value, Attack)):
        return f"{value!r} is not a class derived from Attack{rule}"
    if isabstract(value):
        return f"{value.__name__} does not define {', '.join(sorted(value.__abstractmethods__))}{rule}"
    if not getattr(getattr(value, "__dataclass_params__", None), "frozen", False):
        return f"{value.__name__} is not a frozen dataclass{rule}"
    hints = get_type_hints(Attack)
    levels = get_args(get_args(hints["access"])[0])
    if value.access not in levels:
        return f"{value.__name__}.access={value.access!r} must be one of {', '.join(levels)}"
    serves: Any = value.serves
    if not (isinstance(serves, tuple) and all(isinstance(kind, type) and issubclass(kind, Threat) for kind in serves)):
        return f"{value.__name__}.serves={serves!r} must be a tuple of threats: (Linf, L2)"
    get_type_hints(value)  # needed to parse its fields; raises if a name is not defined
    return ""


def _one_line(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
