"""What stands behind a function: the modules that it runs, and the random generators of their own."""

from __future__ import annotations

import functools
import inspect
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["generators_of", "module_of"]

_DEPTH = 4  # of wrappers inside wrappers
_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def module_of(*fns: Callable[..., Any]) -> nn.Module | None:
    """The module behind some functions; several are put in one list, so that all can be held. None if there is none.

    Found are a module itself, the owner of a bound method, and what a function, a partial, a decorated function or a
    callable object refers to by its variables, arguments, attributes and containers.
    """
    modules = list(dict.fromkeys(thing for thing in _walk(fns, _DEPTH, set()) if isinstance(thing, nn.Module)))
    inner = {part for module in modules for part in module.modules() if part is not module}
    outer = [module for module in modules if module not in inner]
    if len(outer) < 2:
        return next(iter(outer), None)
    several = nn.ModuleList(outer)
    several.training = False  # of its own it has no mode, and a fresh one would pass for a part in training
    return several


def generators_of(*fns: Callable[..., Any]) -> list[_Generator]:
    """The random generators that some functions, or the modules behind them, hold as their own."""
    things = list(_walk(fns, _DEPTH, set()))
    parts = [part for thing in things if isinstance(thing, nn.Module) for part in thing.modules()]
    parts = [part for thing in things if isinstance(thing, nn.Module) for part in thing.modules()]
    held = [value for part in parts for value in vars(part).values()]
    return list({id(thing): thing for thing in (*things, *held) if isinstance(thing, _Generator)}.values())


def _walk(things: Iterable[Any], depth: int, seen: set[int]) -> Iterator[Any]:  # Any: whatever a variable may hold
    for thing in things:
        if id(thing) not in seen and not isinstance(thing, type | types.ModuleType | torch.Tensor | str | bytes):
            seen.add(id(thing))
            yield thing
            if depth and not isinstance(thing, nn.Module | _Generator):
                yield from _walk(_within(thing), depth - 1, seen)


def _within(thing: Any) -> list[Any]:
    """What a thing refers to: one step."""
    if inspect.ismethod(thing):
        return [thing.__self__]
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.isfunction(thing):
        seen = inspect.getclosurevars(thing)
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return [getattr(thing, "__wrapped__", None), *seen.nonlocals.values(), *seen.globals.values(), *defaults]
    if isinstance(thing, dict):
        return list(thing.values())
    if isinstance(thing, list | tuple | set):
        return list(thing)
    return list(getattr(thing, "__dict__", {}).values())
