"""The layers of a model: their names, and the output of one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.errors import ArgumentError

__all__ = ["flat_output", "layer_named", "layers_of", "truncate_after"]


class _StopForward(BaseException):
    """Raised once the wanted layer has run, so that the rest of the model does not."""


@contextmanager
def _forward_hooks(modules: dict[str, nn.Module], hook: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `hook(name, output)` whenever one of the modules has run; the hooks are removed on exit."""
    handles = [
        module.register_forward_hook(lambda _module, _args, out, name=name: hook(name, out)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(module: nn.Module | None, fn: Callable[[Tensor], Any], x: Tensor) -> dict[str, nn.Module]:
    """The layers that run in `fn(x)` and return one floating-point tensor, by name, in the order in which they finish."""
    modules = {name: part for name, part in module.named_modules() if name} if module is not None else {}
    names: list[str] = []

    def record(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and out.shape[:1] == x.shape[:1]:
            names.append(name)

    with _forward_hooks(modules, record), torch.no_grad():
        fn(x.clone())
    return {name: modules[name] for name in dict.fromkeys(names)}


def layer_named(name: str, layers: dict[str, nn.Module]) -> nn.Module:
    """The layer of that name.

    Raises:
        ArgumentError: There is no such layer; the message lists the names.
    """
    if name not in layers:
        raise ArgumentError(f"layer={name!r} does not exist; this model has {', '.join(layers) or 'no layers'}")
    return layers[name]


def flat_output(fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """`fn` with its output, one tensor or a nested tuple of tensors, flattened to one matrix, (N, *S) -> (N, D)."""

    def flat_fn(x: Tensor) -> Tensor:
        out = fn(x.clone())
        return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in _tensors(out)], 1)

    return flat_fn


def _tensors(out: Any) -> list[Tensor]:
    """The floating-point tensors of a nested output."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    return [tensor for part in out for tensor in _tensors(part)] if isinstance(out, tuple | list) else []


def truncate_after(layer: nn.Module, fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """`fn` cut off after `layer`, whose output it returns, (N, *S) -> (N, *H); later layers do not run."""

    def truncated(x: Tensor) -> Tensor:
        outputs: list[Tensor] = []

        def stop(_name: str, out: Any) -> None:
            outputs.append(out)
            raise _StopForward

        with _forward_hooks({"": layer}, stop):
            try:
                fn(x.clone())  # a copy, since a model may write to its input
            except _StopForward:
                return outputs[0]
        raise ArgumentError(f"layer {layer!r} did not run; name one that does")

    return truncated
