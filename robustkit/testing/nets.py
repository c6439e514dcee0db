"""Small models for the laws: an ordinary net, one that counts its inputs, one that raises, one with random outputs."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

__all__ = ["Counter", "FailingNet", "RandomClassifier", "module_state", "small_net", "smooth_net"]


def small_net(shape: torch.Size, seed: int) -> nn.Module:
    """A convolutional net with two classes for images of `shape` (C, H, W), with all state that an attack could change.

    It has batch norm and dropout in different modes, a frozen parameter, a parameter with a gradient, and a hook.
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
    """A smooth float64 net with two classes for inputs of `shape`; rounding errors stay small."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), 8), nn.Tanh(), nn.Linear(8, 2))
    return net.double().eval()


def _ignore(module: nn.Module, args: Any, out: Any) -> None:
    return


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def module_state(net: nn.Module) -> dict[str, Any]:
    """Return the state of a module that an attack must not change, in a form that compares with ==."""
    state: dict[str, Any] = {}
    for name, module in net.named_modules():
        state[f"{name}:mode"] = module.training
        state[f"{name}:hooks"] = [list(getattr(module, kind)) for kind in _HOOKS]
    for name, parameter in net.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.tolist()
        state[f"{name}:parameter"] = (parameter.tolist(), parameter.requires_grad, grad)
    for name, buffer in net.named_buffers():
        state[f"{name}:buffer"] = (id(buffer), buffer.tolist())
    return state


@final
class Counter(nn.Module):
    """A model that counts its input images in `seen`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, 0

    def forward(self, x: Tensor) -> Any:
        """The output of the inner model."""
        self.seen += len(x)
        return self.net(x)


@final
class FailingNet(nn.Module):
    """A model that raises `FailingNet.FailureError` once, after a number of calls."""

    class FailureError(Exception):
        """The model's own error."""

    def __init__(self, net: nn.Module, calls: int) -> None:
        super().__init__()
        self.net, self.calls = net, calls

    def forward(self, x: Tensor) -> Any:
        """The output of the inner model, except for one failure."""
        self.calls -= 1
        if self.calls == -1:  # once only, so that an attack that swallows the error continues and is detected
            raise FailingNet.FailureError
        return self.net(x)


@final
class RandomClassifier(nn.Module):
    """Two classes at random for any input: the second with probability `wrong`, from torch's global generator."""

    def __init__(self, wrong: float) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2) with a small term in x, so that the gradient is not zero."""
        wrong = (torch.rand(len(x), device=x.device) < self.wrong).to(x)
        return torch.stack([1 - 2 * wrong, 2 * wrong - 1], 1) + 1e-3 * x.flatten(1).mean(1, keepdim=True)
