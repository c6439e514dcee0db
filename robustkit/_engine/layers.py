"""A look inside a model: what its layers are called, and what one of them says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustkit.errors import ArgumentError

__all__ = ["joined", "layers_of", "up_to"]


class _Reached(BaseException):
    """The layer has spoken; the rest of the model need not run."""


@contextmanager
def _hooked(modules: dict[str, nn.Module], hear: Callable[[str, Any], None]) -> Iterator[None]:
    """`hear` is called with the name and the output of each of the modules; the hooks are gone afterwards."""
    handles = [
        module.register_forward_hook(lambda _module, _args, out, name=name: hear(name, out)) for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_of(module: nn.Module | None, fn: Callable[[Tensor], Any], x: Tensor) -> dict[str, nn.Module]:
    """The layers that run when `fn` is asked about x, by name, in the order in which they end; those that give one tensor."""
    named = {name: part for name, part in module.named_modules() if name} if module is not None else {}
    seen: list[str] = []

    def hear(name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and out.shape[:1] == x.shape[:1]:
            seen.append(name)

    with _hooked(named, hear), torch.no_grad():
        fn(x.clone())
    return {name: named[name] for name in dict.fromkeys(seen)}


def joined(fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """All that `fn` says as one matrix, whether that is one tensor or several, (N, *S) -> (N, D)."""

    def said(x: Tensor) -> Tensor:
        out = fn(x.clone())
        return torch.cat([part.flatten(1) if part.dim() > 1 else part[:, None] for part in _tensors(out)], 1)

    return said


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    return [tensor for part in out for tensor in _tensors(part)] if isinstance(out, tuple | list) else []


def up_to(layer: nn.Module, fn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """What `layer` says when `fn` is asked, (N, *S) -> (N, *H); nothing runs after it."""

    def heard(x: Tensor) -> Tensor:
        said: list[Tensor] = []

        def hear(_name: str, out: Any) -> None:
            said.append(out)
            raise _Reached

        with _hooked({"": layer}, hear):
            try:
                fn(x.clone())  # a copy goes in, so that a model that writes to its input harms nobody
            except _Reached:
                return said[0]
        raise ArgumentError(f"layer {layer!r} did not run; name one that does")

    return heard
