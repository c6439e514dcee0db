import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit._engine.noise import Noise, philox

# Known answers of the reference implementation (Random123, file kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_agrees_with_the_reference_implementation(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def slow_philox(counter, key):
    """The definition, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.slow
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 9), st.integers(-5, 5), st.text())
def test_bits_are_philox_of_id_and_position(example, position, seed, purpose):
    noise = Noise(seed, torch.tensor([example])).at(purpose)
    key = noise.key
    words = slow_philox((example % 2**32, (example >> 32) % 2**32, position // 4, 0), (key % 2**32, key >> 32))
    assert int(noise.bits(10)[0, position]) == words[position % 4]


def test_a_draw_depends_on_its_example_only():
    ids = torch.tensor([5, 2**40 + 1, 7])
    noise = Noise(1, ids).at("start", 0)
    rows = torch.tensor([2, 0])
    for draw in ("bits", "uniform", "normal", "exponential"):
        assert torch.equal(getattr(noise[rows], draw)(3, 4), getattr(noise, draw)(3, 4)[rows])


def test_no_two_purposes_share_a_draw():
    ids = torch.arange(50)
    paths = [("start", 0), ("start", 1), ("start",), (0, "start"), ("start", "0"), ("s", "tart", 0)]
    draws = [Noise(seed, ids).at(*path).bits(40).flatten().tolist() for path in paths for seed in (0, 1, -1)]
    numbers = [number for draw in draws for number in draw]
    # Of 36,000 draws from 2^32, the birthday problem expects 0.15 pairs.
    assert len(numbers) - len(set(numbers)) <= 3


def test_distributions():
    noise = Noise(3, torch.arange(100))
    for name, law in {"uniform": "uniform", "normal": "norm", "exponential": "expon"}.items():
        sample = getattr(noise.at(name), name)(1000)
        assert scipy.stats.kstest(sample.flatten().numpy(), law).pvalue > 1e-3, name
        assert torch.corrcoef(sample[:, :2].T)[0, 1].abs() < 4 / math.sqrt(100)
    uniform = noise.uniform(1000)
    assert uniform.min() >= 0
    assert uniform.max() < 1


def test_scalars_and_empty_batches():
    assert Noise(0, torch.arange(3)).uniform().shape == (3,)
    assert Noise(0, torch.arange(0)).normal(2, 2).shape == (0, 2, 2)
