"""The architectures of the reference models, from images in [0, 1] to logits."""

from __future__ import annotations

from torch import nn

__all__ = ["digits_mlp", "mnist_cnn"]


def mnist_cnn() -> nn.Module:
    """Two strided convolutions and a hidden layer for 28x28 digits, (N, 1, 28, 28) -> (N, 10); 166,406 parameters.

    Source: the small network of Wong & Kolter 2018, appendix B.1 (https://arxiv.org/abs/1711.00851).
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def digits_mlp() -> nn.Module:
    """One hidden layer for 8x8 digits, (N, 1, 8, 8) -> (N, 10); 9,610 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
