"""How close does each single-pixel attack come to exhaustive search, and what does it cost?

    OMP_NUM_THREADS=1 python -m benchmarks.pixel_ceiling --train FILE.npz --data FILE.npz [--images 60] [--evolution 20]

Only images that the model classifies correctly are attacked. The ceiling is an exhaustive search over every location in every
extreme colour (two with one channel, eight with three), and on a few images also in a grid of colours. `two colours` is a
simple baseline: black and white at every location in chunks of 256, stopping at the first success, then the other extreme
colours at the 64 locations with the lowest confidence. Forwards are those of the search alone, without the check of the clean
image before and the judging after. The evolution runs only on the first images: a failure costs 30,400 forwards. The result is
written to benchmarks/results/pixel_ceiling.json.
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
    """Return all colours of the given levels, (M, C); the first is the darkest, the last the brightest."""
    return torch.tensor(list(itertools.product(levels, repeat=channels)))


@torch.no_grad()
def query_pixels(net: nn.Module, x: Tensor, y: Tensor, places: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Query one image (C, H, W) with single pixels changed: misclassified (M,) bool, log-probability of the label (M,)."""
    points = x.repeat(len(places), 1, 1, 1).flatten(2)
    points[torch.arange(len(places)), :, places] = colours
    out = net(points.reshape(len(places), *x.shape))
    return out.argmax(1) != y, out.log_softmax(1)[:, y]


def exhaustive_search(net: nn.Module, x: Tensor, y: Tensor, colours: Tensor) -> Outcome:
    """Try every location in every colour; forwards are those of a search that does not stop early."""
    locations, success = x.shape[2] * x.shape[3], []
    places, colour_ids = torch.arange(locations).repeat(len(colours)), torch.arange(len(colours)).repeat_interleave(locations)
    for image, label in zip(x, y, strict=True):
        chunks = zip(places.split(CHUNK), colour_ids.split(CHUNK), strict=True)  # type: ignore[no-untyped-call]
        success.append(any(bool(query_pixels(net, image, label, chunk, colours[ids])[0].any()) for chunk, ids in chunks))
    return torch.tensor(success), torch.full((len(x),), len(places))


def two_colours(net: nn.Module, x: Tensor, y: Tensor) -> Outcome:
    """Run the simple baseline on each image."""
    success, forwards = zip(*(_search_two_colours(net, image, label) for image, label in zip(x, y, strict=True)), strict=True)
    return torch.tensor(success), torch.tensor(forwards)


def _search_two_colours(net: nn.Module, x: Tensor, y: Tensor) -> tuple[bool, int]:
    locations, colours, spent = x.shape[1] * x.shape[2], palette(len(x), (0.0, 1.0)), 0
    lowest = torch.full((locations,), torch.inf)
    for colour in (colours[0], colours[-1]):
        for places in torch.arange(locations).split(CHUNK):  # type: ignore[no-untyped-call]
            wrong, confidence = query_pixels(net, x, y, places, colour)
            spent += len(places)
            if wrong.any():
                return True, spent
            lowest[places] = torch.minimum(lowest[places], confidence)
    places = lowest.argsort(stable=True)[:BEST].repeat_interleave(len(colours) - 2)
    colour_ids = 1 + torch.arange(len(colours) - 2).repeat(min(BEST, locations))
    for chunk in torch.arange(len(places)).split(CHUNK):  # type: ignore[no-untyped-call]
        spent += len(chunk)
        if query_pixels(net, x, y, places[chunk], colours[colour_ids[chunk]])[0].any():
            return True, spent
    return False, spent


def run_attack(attack: Attack, net: nn.Module, x: Tensor, y: Tensor, pixels: int) -> Outcome:
    """Run an attack of this package, and judge its result here again."""
    result = attack(net, x, y, threat=Pixels(pixels))
    with torch.no_grad():
        wrong = net(result.x_adv).argmax(1) != y
    assert torch.equal(wrong, result.success)
    assert int((result.x_adv != x).any(1).flatten(1).sum(1).max()) <= pixels
    # Without two forwards per image: the check of the clean image and the final judgement.
    return result.success, result.forwards - 2


def summarise(outcome: Outcome, seconds: float, ceiling: Tensor | None = None) -> dict[str, Any]:
    """Summarise success, mean forwards (also of successes and failures), and the share of the ceiling that is reached."""
    success, forwards = outcome[0], outcome[1].double()
    masks = {"": success | True, "_success": success, "_failure": ~success}
    summary: dict[str, Any] = {"images": len(success), "success": int(success.sum())}
    summary |= {
        f"forwards{name}": round(forwards[mask].mean().item(), 1) if mask.any() else None for name, mask in masks.items()
    }
    if ceiling is not None:
        reached, best = int((success & ceiling).sum()), int(ceiling.sum())
        summary |= {"of_the_ceiling": round(reached / best, 4) if best else None, "beyond_it": int((success & ~ceiling).sum())}
    return summary | {"seconds_an_image": round(seconds / len(success), 4)}


def timed(run: Callable[[], Outcome]) -> tuple[Outcome, float]:
    """Return the result of a function, and its time in seconds."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def one_pixel(net: nn.Module, x: Tensor, y: Tensor, few: int, fine: int) -> dict[str, Any]:
    """Run all attacks with one pixel on one model."""
    extreme, seconds = timed(lambda: exhaustive_search(net, x, y, palette(x.shape[1], (0.0, 1.0))))
    levels = torch.linspace(0, 1, 33 if x.shape[1] == 1 else 5).tolist()
    rows = {"every extreme colour": summarise(extreme, seconds)}
    if fine:
        rows["every colour of a grid"] = summarise(
            *timed(lambda: exhaustive_search(net, x[:fine], y[:fine], palette(x.shape[1], levels))), extreme[0][:fine]
        )
    rows["two colours"] = summarise(*timed(lambda: two_colours(net, x, y)), extreme[0])
    for attack in (PixelSearch(), SparseRS()):
        rows[type(attack).__name__] = summarise(*timed(partial(run_attack, attack, net, x, y, 1)), extreme[0])
    if few:
        rows["OnePixel"] = summarise(*timed(lambda: run_attack(OnePixel(), net, x[:few], y[:few], 1)), extreme[0][:few])
        rows["PixelSearch, the images of OnePixel"] = summarise(
            *timed(lambda: run_attack(PixelSearch(), net, x[:few], y[:few], 1)), extreme[0][:few]
        )
    return rows


def several_pixels(net: nn.Module, x: Tensor, y: Tensor, pixels: int, few: int) -> dict[str, Any]:
    """Run the attacks with several pixels, where exhaustive search is impossible."""
    attacks: list[Attack] = [PixelSearch(), SparseRS(queries=600 * pixels)]
    rows = {type(attack).__name__: summarise(*timed(partial(run_attack, attack, net, x, y, pixels))) for attack in attacks}
    if few:
        rows["OnePixel"] = summarise(*timed(lambda: run_attack(OnePixel(), net, x[:few], y[:few], pixels)))
        rows["PixelSearch, the images of OnePixel"] = summarise(
            *timed(lambda: run_attack(PixelSearch(), net, x[:few], y[:few], pixels))
        )
    return rows


def correctly_classified(net: nn.Module, x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` images that the net classifies correctly, and their labels."""
    with torch.no_grad():
        correct = torch.cat([net(x[i : i + 200]).argmax(1) == y[i : i + 200] for i in range(0, len(x), 200)])
    rows = correct.nonzero().squeeze(1)[:count]
    return x[rows], y[rows]


def main() -> None:
    """Measure all models; write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True, help="npz file with x (N, 32, 32, 3) bytes and y")
    parser.add_argument("--data", required=True, help="the same format, with held-out images")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--residual", type=int, default=20, help="images for the residual net, which is 20 times slower")
    parser.add_argument("--evolution", type=int, default=20, help="images for the evolution; it is not run on the residual net")
    parser.add_argument("--fine", type=int, default=2, help="images for the grid of colours; it is not run on the residual net")
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
        test_data = data.load("digits" if name == "digits-mlp" else "mnist-5k") if shipped else None
        x, y = (test_data.x, test_data.y) if test_data is not None else images(options.data)
        x, y = correctly_classified(net, x, y, options.residual if slow else options.images)
        few = 0 if slow else options.evolution
        result[name] = {"1 pixel": one_pixel(net, x, y, few, 0 if slow else options.fine)}
        for pixels in (3, 5):
            result[name][f"{pixels} pixels"] = several_pixels(net, x, y, pixels, few)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
