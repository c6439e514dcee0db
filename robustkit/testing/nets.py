"""Small models for the laws: an ordinary net, one that counts, one that fails, one that tosses a coin."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["Coin", "Counter", "Fuse", "small_net", "smooth_net", "world_of"]


def small_net(shape: torch.Size, seed: int) -> nn.Module:
    """A convolutional net with everything that an attack could disturb, for images of `shape` (C, H, W), two classes.

    Batch norm and dropout in mixed modes, a frozen parameter, a parameter that already holds a gradient, a hook.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, last = nn.Conv2d(shape[0], 4, 3, padding=1), nn.Linear(4 * shape[1] * shape[2], 2)
    dropout, relu = nn.Dropout(0.1), nn.ReLU()
    net = nn.Sequential(first, nn.BatchNorm2d(4), relu, dropout, nn.Flatten(), last).eval()
    dropout.train()
    first.weight.requires_grad_(False)
    last.weight.grad = torch.ones_like(last.weight)
    relu.register_forward_hook(_ignore)
    return net


def smooth_net(shape: torch.Size, seed: int) -> nn.Module:
    """A net without kinks in float64, for inputs of `shape`, two classes: a rounding stays a rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 8), nn.Tanh(), nn.Linear(8, 2))
    return net.double().eval()


def _ignore(module: nn.Module, args: Any, out: Any) -> None:
    return


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def world_of(net: nn.Module) -> dict[str, Any]:
    """Everything about a module that an attack must leave as it was, in a form that compares with ==."""
    world: dict[str, Any] = {}
    for name, part in net.named_modules():
        world[f"{name}:mode"] = part.training
        world[f"{name}:hooks"] = [
            list(getattr(part, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        ]
    for name, parameter in net.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        world[f"{name}:parameter"] = (parameter.tolist(), parameter.requires_grad, grad)
    for name, buffer in net.named_buffers():
        world[f"{name}:buffer"] = (id(buffer), buffer.tolist())
    return world


@final
class Counter(nn.Module):
    """A model that counts the images that it sees, in `seen`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x: Tensor) -> Any:
        """What the inner model says."""
        self.seen += len(x)
        return self.net(x)


@final
class Fuse(nn.Module):
    """A model that raises `Fuse.BlownError` once, after a number of calls."""

    class BlownError(Exception):
        """The model's own failure."""

    def __init__(self, net: nn.Module, calls: int) -> None:
        super().__init__()
        self.net, self.calls = net, calls

    def forward(self, x: Tensor) -> Any:
        """What the inner model says, but for one failure."""
        self.calls -= 1
        if self.calls == -1:  # once only, so that somebody who swallows it is found out
            raise Fuse.BlownError
        return self.net(x)


@final
class Coin(nn.Module):
    """Two classes at random whatever the input: the second with probability `wrong`, by torch's global generator."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2) with a little of x in them, so that there is a gradient to follow."""
        wrong = (torch.rand(len(x), device=x.device) < self.wrong).to(x)
        return torch.stack([1 - 2 * wrong, 2 * wrong - 1], 1) + 1e-3 * x.flatten(1).mean(1, keepdim=True)
