"""Leaving the caller's world as found: a model's modes, gradient switches and buffers, and the global random states."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Mode", "fork_generators", "fork_rng", "frozen", "is_out_of_memory", "random_state"]

Mode = Literal["eval", "train", "as-is"]


@contextmanager
def frozen(module: nn.Module | None, mode: Mode) -> Iterator[None]:
    """The module in `mode` with frozen parameters; afterwards every flag, switch and buffer is what it was."""
    if module is None:
        yield
        return
    # Flags are set part by part: `train()` may be overridden to do more (merge weights, say), and that would stay.
    flags = [(part, part.training) for part in module.modules() if hasattr(part, "training")]
    switches = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
        if not buffer.is_meta
    ]
    try:
        for part, _ in flags if mode != "as-is" else []:
            part.training = mode == "train"
        for parameter, _ in switches:
            parameter.requires_grad_(False)
        yield
    finally:
        for part, flag in flags:
            part.training = flag
        for parameter, switch in switches:
            parameter.requires_grad_(switch)
        for part, name, buffer, before in buffers:
            _restore(part, name, buffer, before)


def _restore(part: nn.Module, name: str, buffer: Tensor, before: Tensor) -> None:
    scripted = isinstance(part, torch.jit.ScriptModule)  # these hand out a new tensor object for each look
    if not scripted and part._buffers.get(name) is not buffer:
        part._buffers[name] = buffer
    # Through `.data`, and only where it changed: autograd is to see no write, since the caller may have a graph under way.
    if buffer.shape != before.shape:
        buffer.data = before
    elif not torch.equal(buffer, before):
        buffer.data.copy_(before)


def random_state(own: Iterable[object] = ()) -> tuple[bytes, ...]:
    """The states of the global generators of torch (CPU and the devices in use), numpy and Python, and of some others."""
    states = [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if _cuda_in_use() else [])
    numbers = [pickle.dumps(np.random.get_state()), pickle.dumps(random.getstate())]
    return (*(state.cpu().numpy().tobytes() for state in states), *numbers, *map(_state_of, own))


def _state_of(generator: object) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    return pickle.dumps(generator)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def fork_rng(seed: int) -> Iterator[None]:
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


@contextmanager
def fork_generators(generators: Iterable[Any], seed: int) -> Iterator[None]:
    """Generators of somebody's own (of torch, numpy or Python) seeded inside, and afterwards as they were."""
    generators = list(generators)
    states = [_get(generator) for generator in generators]
    try:
        for number, generator in enumerate(generators):
            _seed(generator, (seed + number) % 2**63)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            _set(generator, state)


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.setstate(state)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    else:
        generator.seed(seed % 2**32)
