"""Hypothesis strategies: images, gradients, labels, logits, threats and hyperplane classifiers.

Hypothesis draws a seed and a kind for each tensor, not its elements: this is about a thousand times faster, and still
shrinks to the smallest shape and the simplest kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.testing.hyperplane import Halfspace, Hyperplane
from robustkit.threats import L1, L2, Linf, Pixels, Threat

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise MissingExtraError("hypothesis", "testing", error) from error

__all__ = ["ALL_THREATS", "gradients", "hyperplanes", "images", "labels", "logits", "shapes", "threats"]

ALL_THREATS: tuple[type[Threat], ...] = (Linf, L2, L1, Pixels)
_SEEDS = st.integers(0, 2**32 - 1)


def shapes(*, largest: int = 5) -> SearchStrategy[tuple[int, int, int, int]]:
    """Generate shapes (N, C, H, W) with 1 to `largest` images, 1 to 3 channels and sides from 2 to 2 + `largest`."""
    side = st.integers(2, 2 + largest)
    return st.tuples(st.integers(1, largest), st.integers(1, 3), side, side)


def images(shape: tuple[int, ...]) -> SearchStrategy[Tensor]:
    """Generate images in [0, 1] of a given shape: uniform, multiples of 1/255, black and white, mostly black, or constant."""
    return st.builds(lambda seed, kind: _image(shape, seed, kind), _SEEDS, st.sampled_from(sorted(_KINDS)))


def gradients(shape: tuple[int, ...]) -> SearchStrategy[Tensor]:
    """Generate gradients of a given shape with scales from 1e-12 to 1e6, some with zeros, with ties, or all zero."""
    kinds = st.sampled_from(["normal", "zeros", "signs", "nothing"])
    return st.builds(lambda seed, kind, scale: _gradient(shape, seed, kind, 10.0**scale), _SEEDS, kinds, st.integers(-12, 6))


def labels(n: int, classes: int) -> SearchStrategy[Tensor]:
    """Generate labels in [0, classes), (n,) int64."""
    return st.lists(st.integers(0, classes - 1), min_size=n, max_size=n).map(lambda y: torch.tensor(y, dtype=torch.int64))


def logits(n: int, classes: int) -> SearchStrategy[Tensor]:
    """Generate logits (n, classes) with scales from 1e-12 to 1e6."""
    return gradients((n, classes))


def threats(
    kinds: Sequence[type[Threat]] = ALL_THREATS,
    *,
    bounded: bool = True,
    locations: int = 3,
    budgets: SearchStrategy[float] | None = None,
) -> SearchStrategy[Threat]:
    """Generate threats with eps from nearly zero to the whole range of values.

    Args:
        kinds: The threat classes.
        bounded: Whether they have the bounds [0, 1] or none.
        locations: The largest eps of Pixels; the smallest images have four locations.
        budgets: A strategy of eps, for threats other than the four of this package.

    Raises:
        ArgumentError: A threat of your own without `budgets`.
    """
    eps = {
        Linf: st.floats(1e-4, 1.0),
        L2: st.floats(1e-3, 5.0),
        L1: st.floats(1e-2, 30.0),
        Pixels: st.integers(1, locations),
    }
    bounds = (0.0, 1.0) if bounded else None
    unknown = [kind.__name__ for kind in kinds if kind not in eps and budgets is None]
    if unknown:
        raise ArgumentError(f"budgets=None: {unknown[0]} needs a strategy of eps, for example st.floats(0.01, 1.0)")
    return st.sampled_from(kinds).flatmap(
        lambda kind: st.builds(kind, eps[kind] if budgets is None else budgets, st.just(bounds))
    )


def hyperplanes(*, largest: int = 4) -> SearchStrategy[Hyperplane]:
    """Generate linear classifiers on small images, in float64 so that the closed form is exact to 1e-12."""
    return st.builds(_hyperplane, _SEEDS, shapes(largest=largest), st.sampled_from(["uniform", "bytes", "binary"]))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "a grey": lambda x: x.flatten(1)[:, :1].reshape(-1, *[1] * (x.dim() - 1)).expand_as(x).clone(),
    "binary": lambda x: x.round(),
    "bytes": lambda x: (x * 255).round() / 255,
    "mostly black": lambda x: (2 * x - 1).clamp(min=0),
    "uniform": lambda x: x,
}


def _image(shape: tuple[int, ...], seed: int, kind: str) -> Tensor:
    return _KINDS[kind](torch.rand(shape, generator=_generator(seed)))


def _gradient(shape: tuple[int, ...], seed: int, kind: str, scale: float) -> Tensor:
    normal = torch.randn(shape, generator=_generator(seed))
    kinds = {"normal": normal, "zeros": normal * (normal > 0), "signs": normal.sign(), "nothing": torch.zeros(shape)}
    return kinds[kind] * scale


def _hyperplane(seed: int, shape: tuple[int, int, int, int], kind: str) -> Hyperplane:
    x = _image(shape, seed, kind).double()
    weight = torch.randn(shape[1:], generator=_generator(seed + 1), dtype=torch.float64)
    median_score = float((x * weight).flatten(1).sum(1).median())  # so that points lie on both sides of the plane
    shift = float(torch.rand((), generator=_generator(seed + 2))) - 0.5
    net = Halfspace(weight, shift - median_score)
    with torch.no_grad():
        y = net(x).argmax(1)
    return Hyperplane(net, x, y)
