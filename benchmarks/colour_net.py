"""Two small nets for 32 x 32 colour images; this script trains and caches them in one or two minutes on one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.colour_net --train FILE.npz --data FILE.npz [--kind residual]

The package ships no net for colour images; benchmarks that need one, such as those of pixel attacks, use this module.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robustkit import Normalize, data
from robustkit.zoo.cards import sha256

__all__ = ["KINDS", "accuracy", "colour_net", "images", "residual_body"]

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.244, 0.262)
BATCH, RATE, DECAY = 100, 0.003, 0.02


def residual_body(before: int, after: int, stride: int) -> nn.Module:
    """Return the layers of a pre-activation residual block, (N, before, H, W) -> (N, after, H / stride, W / stride)."""
    return nn.Sequential(
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.Conv2d(before, after, 3, stride, 1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
    )


class _ResidualBlock(nn.Module):
    """h + conv(relu(bn(conv(relu(bn(h)))))), with a strided first convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = residual_body(before, after, stride)
        self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(N, before, H, W) -> (N, after, H / stride, W / stride)."""
        out: Tensor = self.short(h) + self.body(h)
        return out


def _lenet() -> nn.Module:
    """LeNet-5 with ReLU for colour images (62,006 parameters)."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )


def _residual() -> nn.Module:
    """Three residual blocks of 16, 32 and 64 channels (77,850 parameters)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        _ResidualBlock(16, 16, 1),
        _ResidualBlock(16, 32, 2),
        _ResidualBlock(32, 64, 2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {"lenet": (_lenet, 40), "residual": (_residual, 16)}


def images(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return the images (N, C, H, W) in [0, 1] and the labels (N,) of an npz file with uint8 x and y."""
    test_data = data.load(f"npz:{path}")
    return test_data.x, test_data.y


def colour_net(train: str | Path, kind: str = "lenet", seed: int = 0, cache: str | Path | None = None) -> nn.Module:
    """Return a net in evaluation mode, images (N, 3, 32, 32) in [0, 1] -> logits (N, 10); trained if it is not in the cache.

    Args:
        train: The npz file of the training images.
        kind: A name of `KINDS`.
        seed: Seed of the weights, the order and the augmentation.
        cache: A folder for the weights; default one in the folder for temporary files.
    """
    build, epochs = KINDS[kind]
    folder = Path(cache) if cache is not None else Path(tempfile.gettempdir()) / "robustkit-colour-nets"
    file = folder / f"{kind}-{seed}-{epochs}-{sha256(Path(train))[:12]}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(Normalize(MEAN, STD), build())
        if file.exists():
            net.load_state_dict(load_file(file))
        else:
            _fit(net, *images(train), epochs)
            folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{time.time_ns()}")  # renamed when complete: two processes may train at once
            save_file(net.state_dict(), part)
            part.replace(file)
    return net.eval()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that the net classifies correctly."""
    with torch.no_grad():
        hits = [net(x[i : i + 500]).argmax(1) == y[i : i + 500] for i in range(0, len(x), 500)]
    return torch.cat(hits).float().mean().item()


def _fit(net: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """Train with AdamW and a one-cycle learning rate."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * -(-len(x) // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(_augment(x[rows])), y[rows], label_smoothing=0.05).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _augment(x: Tensor) -> Tensor:
    """Flip and shift each image at random, by up to four pixels with reflection padding."""
    n, _, height, width = x.shape
    x = torch.where(torch.rand(n, 1, 1, 1) < 0.5, x.flip(3), x)
    padded = nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, n, 1))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Train or load a net, and print its accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same format, with held-out images")
    parser.add_argument("--kind", default="lenet", choices=list(KINDS))
    parser.add_argument("--cache", help="folder for the weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    net = colour_net(options.train, options.kind, cache=options.cache)
    seconds = time.perf_counter() - start
    size = sum(weight.numel() for weight in net.parameters())
    print(f"{options.kind}: {size} parameters, {accuracy(net, *images(options.data)):.1%} accuracy, {seconds:.0f} s")


if __name__ == "__main__":
    main()
