"""Random numbers keyed by example: the same for any batch size, order, shard or resume.

A counter-based generator (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps
(key, counter) to random bits without any state. The key is a hash of the seed and of the purpose of the draw; the counter
holds the id of the example and the position of the number within its draw.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Noise", "philox"]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Map each counter of four 32-bit words (int64 tensors that broadcast) to four random 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so both halves equal those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


@dataclass(frozen=True, eq=False)
class Noise:
    """A stateless source of random numbers for N examples.

    Attributes:
        seed: Any Python integer.
        ids: Ids of the examples, (N,) int64; the draw of an example depends on no other id.
        path: The purpose of the draw ("start", 3, ...); different paths give independent draws.
    """

    seed: int
    ids: Tensor
    path: tuple[str | int, ...] = ()

    def at(self, *path: str | int) -> Noise:
        """The source with `path` appended to its own; the same path always gives the same numbers."""
        return Noise(self.seed, self.ids, (*self.path, *path))

    def __getitem__(self, rows: Tensor | slice) -> Noise:
        """The source for the examples `rows`; their numbers stay the same."""
        return Noise(self.seed, self.ids[rows], self.path)

    @property
    def key(self) -> int:
        """A 64-bit hash of the seed and the path."""
        return int.from_bytes(hashlib.blake2b(repr((self.seed, self.path)).encode(), digest_size=8).digest(), "little")

    def bits(self, *shape: int) -> Tensor:
        """Random integers in [0, 2^32), (N, *shape) int64."""
        count = math.prod(shape)
        ids = self.ids.reshape(-1, 1)
        block = torch.arange(-(-count // 4), device=ids.device).reshape(1, -1)
        zero = torch.zeros_like(block)
        words: Iterable[Tensor] = philox((ids & _LOW, (ids >> 32) & _LOW, block, zero), (self.key & _LOW, self.key >> 32))
        words = [word.expand(len(ids), block.shape[1]) for word in words]
        return torch.stack(list(words), -1).flatten(1)[:, :count].reshape(len(ids), *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (N, *shape) float32: multiples of 2^-24, which float32 holds exactly."""
        return (self.bits(*shape) >> 8).float() * 2.0**-24

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (N, *shape) float32 (Box & Muller 1958, computed in float64)."""
        pair = (self.bits(2, *shape).double() + 0.5) * 2.0**-32  # in (0, 1): the logarithm is finite
        radius, angle = (-2.0 * pair[:, 0].log()).sqrt(), 2.0 * math.pi * pair[:, 1]
        return (radius * angle.cos()).float()

    def exponential(self, *shape: int) -> Tensor:
        """Exponential with mean 1, (N, *shape) float32."""
        return (-((self.bits(*shape).double() + 0.5) * 2.0**-32).log()).float()
