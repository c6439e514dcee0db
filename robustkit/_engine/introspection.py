"""Find the modules that a function runs and the random generators that they hold."""

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

_MAX_DEPTH = 4  # of nested wrappers
_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


def module_of(*fns: Callable[..., Any]) -> nn.Module | None:
    """The module that the functions run; an nn.ModuleList where there are several, None where there is none.

    It finds a module itself, the owner of a bound method, and modules that a function, a partial, a decorated function or
    a callable object refers to by its variables, arguments, attributes and containers.
    """
    modules = list(dict.fromkeys(obj for obj in _reachable(fns, _MAX_DEPTH, set()) if isinstance(obj, nn.Module)))
    inner = {part for module in modules for part in module.modules() if part is not module}
    outer = [module for module in modules if module not in inner]
    if len(outer) < 2:
        return next(iter(outer), None)
    container = nn.ModuleList(outer)
    container.training = False  # a new container is in training mode, which would raise the flag "train-mode"
    return container


def generators_of(*fns: Callable[..., Any]) -> list[_Generator]:
    """The random generators that the functions, or the modules that they run, hold."""
    objects = list(_reachable(fns, _MAX_DEPTH, set()))
    modules = [module for obj in objects if isinstance(obj, nn.Module) for module in obj.modules()]
    attributes = [value for module in modules for value in vars(module).values()]
    return list({id(obj): obj for obj in (*objects, *attributes) if isinstance(obj, _Generator)}.values())


def _reachable(objects: Iterable[Any], depth: int, visited: set[int]) -> Iterator[Any]:  # Any: a variable may hold anything
    """The objects and, to the given depth, what they refer to, each once; modules and generators are not searched."""
    for obj in objects:
        if id(obj) not in visited and not isinstance(obj, type | types.ModuleType | torch.Tensor | str | bytes):
            visited.add(id(obj))
            yield obj
            if depth and not isinstance(obj, nn.Module | _Generator):
                yield from _reachable(_references(obj), depth - 1, visited)


def _references(obj: Any) -> list[Any]:
    """The objects that `obj` refers to directly."""
    if inspect.ismethod(obj):
        return [obj.__self__]
    if isinstance(obj, functools.partial):
        return [obj.func, *obj.args, *obj.keywords.values()]
    if inspect.isfunction(obj):
        variables = inspect.getclosurevars(obj)
        defaults = [*(obj.__defaults__ or ()), *(obj.__kwdefaults__ or {}).values()]
        return [getattr(obj, "__wrapped__", None), *variables.nonlocals.values(), *variables.globals.values(), *defaults]
    if isinstance(obj, dict):
        return list(obj.values())
    if isinstance(obj, list | tuple | set):
        return list(obj)
    return list(getattr(obj, "__dict__", {}).values())
