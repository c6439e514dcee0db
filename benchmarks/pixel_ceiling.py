"""How close does each attack on single pixels come to trying everything, and what does it cost?

    OMP_NUM_THREADS=1 python -m benchmarks.pixel_ceiling --train FILE.npz --data FILE.npz [--images 60] [--evolution 20]

Only images that the model classifies right count. The ceiling tries every location in every extreme colour (two with one
channel, eight with three), and on a few images in a grid of colours too. `two colours` is the thirty-line search that a user
would write: black and white at every location in chunks of 256, leaving at the first success, then the other extreme
colours at the 64 locations where these did most. Forwards are those of the search alone: without the check of the clean
image before it and the judging after it. The evolution runs on the first images only: what it fails at costs 30,400
forwards. The result goes to benchmarks/results/pixel_ceiling.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.colour_net import colour_net, images
from benchmarks.machine import processor
from robustkit import OnePixel, Pixels, PixelSearch, data, zoo
from robustkit.attack import Attack
from robustkit.attacks import SparseRS

RESULT = Path(__file__).parent / "results" / "pixel_ceiling.json"
CHUNK, BEST = 256, 64
Outcome = tuple[Tensor, Tensor]  # success (N,) bool, forwards (N,) int64


def palette(channels: int, levels: Sequence[float]) -> Tensor:
    """All colours of some levels, the first all low, the last all high, (M, C)."""
    return torch.tensor(list(itertools.product(levels, repeat=channels)))


@torch.no_grad()
def ask(net: nn.Module, x: Tensor, y: Tensor, places: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Whether single pixels of one image change its class, and the probability of the right one, in one chunk."""
    points = x.repeat(len(places), 1, 1, 1).flatten(2)
    points[torch.arange(len(places)), :, places] = colours
    out = net(points.reshape(len(places), *x.shape))
    return out.argmax(1) != y, out.log_softmax(1)[:, y]


def max_threat(net: nn.Module, x: Tensor, y: Tensor, colours: Tensor) -> Outcome:
    """The ceiling: each image is asked about everything, so the forwards are those of a search without an exit."""
    locations, found = x.shape[2] * x.shape[3], []
    places, which = torch.arange(locations).repeat(len(colours)), torch.arange(len(colours)).repeat_interleave(locations)
    for image, label in zip(x, y, strict=True):
        chunks = zip(places.split(CHUNK), which.split(CHUNK), strict=True)  # type: ignore[no-untyped-call]
        found.append(any(bool(ask(net, image, label, at, colours[tint])[0].any()) for at, tint in chunks))
    return torch.tensor(found), torch.full((len(x),), len(places))


def two_colours(net: nn.Module, x: Tensor, y: Tensor) -> Outcome:
    """The thirty-line search."""
    found, spent = zip(*(_two_colours(net, image, label) for image, label in zip(x, y, strict=True)), strict=True)
    return torch.tensor(found), torch.tensor(spent)


def _two_colours(net: nn.Module, x: Tensor, y: Tensor) -> tuple[bool, int]:
    locations, colours, spent = x.shape[1] * x.shape[2], palette(len(x), (0.0, 1.0)), 0
    lowest = torch.full((locations,), torch.inf)
    for colour in (colours[0], colours[-1]):
        for places in torch.arange(locations).split(CHUNK):  # type: ignore[no-untyped-call]
            wrong, right = ask(net, x, y, places, colour)
            spent += len(places)
            if wrong.any():
                return True, spent
            lowest[places] = torch.minimum(lowest[places], right)
    places = lowest.argsort(stable=True)[:BEST].repeat_interleave(len(colours) - 2)
    tints = 1 + torch.arange(len(colours) - 2).repeat(min(BEST, locations))
    for some in torch.arange(len(places)).split(CHUNK):  # type: ignore[no-untyped-call]
        spent += len(some)
        if ask(net, x, y, places[some], colours[tints[some]])[0].any():
            return True, spent
    return False, spent


def attacked(attack: Attack, net: nn.Module, x: Tensor, y: Tensor, pixels: int) -> Outcome:
    """An attack of the package; what comes back is judged here as well."""
    result = attack(net, x, y, threat=Pixels(pixels))
    with torch.no_grad():
        wrong = net(result.x_adv).argmax(1) != y
    assert torch.equal(wrong, result.success)
    assert int((result.x_adv != x).any(1).flatten(1).sum(1).max()) <= pixels
    # A success is told by the search itself and judged once more; so is what is left at the end.
    return result.success, result.forwards - 2


def row(outcome: Outcome, seconds: float, ceiling: Tensor | None = None) -> dict[str, Any]:
    """Success, forwards on average and apart for successes and failures, and what part of the ceiling is reached."""
    success, forwards = outcome[0], outcome[1].double()
    parts = {"": success | True, "_success": success, "_failure": ~success}
    told: dict[str, Any] = {"images": len(success), "success": int(success.sum())}
    told |= {
        f"forwards{name}": round(forwards[which].mean().item(), 1) if which.any() else None for name, which in parts.items()
    }
    if ceiling is not None:
        reached, best = int((success & ceiling).sum()), int(ceiling.sum())
        told |= {"of_the_ceiling": round(reached / best, 4) if best else None, "beyond_it": int((success & ~ceiling).sum())}
    return told | {"seconds_an_image": round(seconds / len(success), 4)}


def timed(run: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """What it returns, and how long it took."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def one_pixel(net: nn.Module, x: Tensor, y: Tensor, few: int, fine: int) -> dict[str, Any]:
    """All contestants with one pixel on one model."""
    extreme, took = timed(lambda: max_threat(net, x, y, palette(x.shape[1], (0.0, 1.0))))
    levels = torch.linspace(0, 1, 33 if x.shape[1] == 1 else 5).tolist()
    told = {"every extreme colour": row(extreme, took)}
    if fine:
        told["every colour of a grid"] = row(
            *timed(lambda: max_threat(net, x[:fine], y[:fine], palette(x.shape[1], levels))), extreme[0][:fine]
        )
    told["two colours"] = row(*timed(lambda: two_colours(net, x, y)), extreme[0])
    for attack in (PixelSearch(), SparseRS()):
        told[type(attack).__name__] = row(*timed(partial(attacked, attack, net, x, y, 1)), extreme[0])
    if few:
        told["OnePixel"] = row(*timed(lambda: attacked(OnePixel(), net, x[:few], y[:few], 1)), extreme[0][:few])
        told["PixelSearch, the images of OnePixel"] = row(
            *timed(lambda: attacked(PixelSearch(), net, x[:few], y[:few], 1)), extreme[0][:few]
        )
    return told


def several(net: nn.Module, x: Tensor, y: Tensor, pixels: int, few: int) -> dict[str, Any]:
    """The attacks with several pixels, where nothing can try everything."""
    attacks: list[Attack] = [PixelSearch(), SparseRS(queries=600 * pixels)]
    told = {type(attack).__name__: row(*timed(partial(attacked, attack, net, x, y, pixels))) for attack in attacks}
    if few:
        told["OnePixel"] = row(*timed(lambda: attacked(OnePixel(), net, x[:few], y[:few], pixels)))
        told["PixelSearch, the images of OnePixel"] = row(
            *timed(lambda: attacked(PixelSearch(), net, x[:few], y[:few], pixels))
        )
    return told


def classified(net: nn.Module, x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first images that the net classifies right."""
    with torch.no_grad():
        right = torch.cat([net(x[i : i + 200]).argmax(1) == y[i : i + 200] for i in range(0, len(x), 200)])
    rows = right.nonzero().squeeze(1)[:count]
    return x[rows], y[rows]


def main() -> None:
    """Measure all models and write the result; it is written after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same for images that the nets have not seen")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--residual", type=int, default=20, help="images for the residual net, which is 20 times slower")
    parser.add_argument("--evolution", type=int, default=20, help="images for the evolution, not run on the residual net")
    parser.add_argument("--fine", type=int, default=2, help="images for the grid of colours, not run on the residual net")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": "python -m benchmarks.pixel_ceiling --train FILE --data FILE "
        f"--images {options.images} --residual {options.residual} --evolution {options.evolution} --fine {options.fine}",
        "machine": {"processor": processor(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__},
    }
    names = ("digits-mlp", "mnist-cnn", "mnist-cnn-robust", "lenet", "residual")
    for name in names:
        slow, shipped = name == "residual", name in zoo.names()
        net = zoo.load(name) if shipped else colour_net(options.train, name)
        held = data.load("digits" if name == "digits-mlp" else "mnist-5k") if shipped else None
        x, y = (held.x, held.y) if held is not None else images(options.data)
        x, y = classified(net, x, y, options.residual if slow else options.images)
        few = 0 if slow else options.evolution
        result[name] = {"1 pixel": one_pixel(net, x, y, few, 0 if slow else options.fine)}
        for pixels in (3, 5):
            result[name][f"{pixels} pixels"] = several(net, x, y, pixels, few)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
