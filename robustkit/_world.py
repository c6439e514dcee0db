"""Leaving the caller's world as found: a model's modes, gradients switches and buffers, and the global random states."""

from __future__ import annotations

import functools
import inspect
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Mode", "held", "module_of", "random_state", "seeded"]

Mode = Literal["eval", "train", "as-is"]


def module_of(fn: Callable[..., Any]) -> nn.Module | None:
    """The module behind a function: itself, the owner of a bound method, or what a plain function refers to.

    A function that refers to several modules gets them in one list, so that all are held; one that hides its modules
    deeper than in its own variables gets None.
    """
    if isinstance(fn, nn.Module):
        return fn
    if inspect.ismethod(fn) and isinstance(fn.__self__, nn.Module):
        return fn.__self__
    if isinstance(fn, functools.partial):
        return module_of(fn.func)
    if not inspect.isfunction(fn):
        return None
    seen = inspect.getclosurevars(fn)
    values = [*seen.nonlocals.values(), *seen.globals.values()]
    found = [v if isinstance(v, nn.Module) else getattr(v, "__self__", None) for v in values]
    modules = list(dict.fromkeys(module for module in found if isinstance(module, nn.Module)))
    return nn.ModuleList(modules) if len(modules) > 1 else next(iter(modules), None)


@contextmanager
def held(module: nn.Module | None, mode: Mode) -> Iterator[None]:
    """The module in `mode` with frozen parameters; afterwards every flag, switch and buffer is what it was."""
    if module is None:
        yield
        return
    flags = [(part, part.training) for part in module.modules()]
    switches = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        if mode != "as-is":
            module.train(mode == "train")
        for parameter, _ in switches:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, flag in flags:
            part.training = flag  # not part.train(): that would reach into the children, whose flags may differ
        for parameter, switch in switches:
            parameter.requires_grad_(switch)
        for part, name, buffer, before in buffers:
            _restore(part, name, buffer, before)


def _restore(part: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    if part._buffers.get(name) is not buffer:
        part._buffers[name] = buffer
    # Written only where it changed: a needless write would break a graph that the caller has yet to go back through.
    if not torch.equal(buffer, before):
        with torch.no_grad():
            buffer.copy_(before)


def random_state() -> tuple[bytes, ...]:
    """The states of the global generators of torch (CPU and the devices in use), numpy and Python, to compare."""
    states = [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if _cuda_in_use() else [])
    return (*(s.numpy().tobytes() for s in states), pickle.dumps(np.random.get_state()), pickle.dumps(random.getstate()))


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and Python seeded inside, and afterwards as they were."""
    torch_before = torch.get_rng_state()
    cuda_before = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    numpy_before, python_before = np.random.get_state(), random.getstate()
    try:
        torch.manual_seed(seed % 2**63)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_before)
        if cuda_before is not None:
            torch.cuda.set_rng_state_all(cuda_before)
        np.random.set_state(numpy_before)
        random.setstate(python_before)
