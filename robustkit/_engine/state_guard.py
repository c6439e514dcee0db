"""Restore the caller's state: a model's modes, `requires_grad` and buffers, and the states of random generators."""

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
    """A context with the module in `mode` and frozen parameters; modes, `requires_grad` and buffers are restored on exit."""
    if module is None:
        yield
        return
    # The mode is set on each submodule, since `train()` may be overridden with lasting effects, such as merging weights.
    modes = [(submodule, submodule.training) for submodule in module.modules() if hasattr(submodule, "training")]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    buffers = [
        (submodule, name, buffer, buffer.detach().clone())
        for submodule in module.modules()
        for name, buffer in submodule.named_buffers(recurse=False)
        if not buffer.is_meta
    ]
    try:
        for submodule, _ in modes if mode != "as-is" else []:
            submodule.training = mode == "train"
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)
        for submodule, name, buffer, saved in buffers:
            _restore_buffer(submodule, name, buffer, saved)


def _restore_buffer(submodule: nn.Module, name: str, buffer: Tensor, saved: Tensor) -> None:
    scripted = isinstance(submodule, torch.jit.ScriptModule)  # these return a new tensor object on every access
    if not scripted and submodule._buffers.get(name) is not buffer:
        submodule._buffers[name] = buffer
    # Through `.data`, and only where it changed: the caller may hold a graph, and autograd must not see a write.
    if buffer.shape != saved.shape:
        buffer.data = saved
    elif not torch.equal(buffer, saved):
        buffer.data.copy_(saved)


def random_state(generators: Iterable[object] = ()) -> tuple[bytes, ...]:
    """The states of the global generators of torch (CPU, and CUDA if in use), numpy and Python, and of `generators`."""
    torch_states = [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if _cuda_in_use() else [])
    other_states = [pickle.dumps(np.random.get_state()), pickle.dumps(random.getstate())]
    return (*(state.cpu().numpy().tobytes() for state in torch_states), *other_states, *map(_state_bytes, generators))


def _state_bytes(generator: object) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    return pickle.dumps(generator)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on the GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def fork_rng(seed: int) -> Iterator[None]:
    """A context in which the global generators of torch, numpy and Python are seeded; their states are restored on exit."""
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
    """A context in which these generators (of torch, numpy or Python) are seeded; their states are restored on exit."""
    generators = list(generators)
    states = [_get_state(generator) for generator in generators]
    try:
        for number, generator in enumerate(generators):
            _seed(generator, (seed + number) % 2**63)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            _set_state(generator, state)


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
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
