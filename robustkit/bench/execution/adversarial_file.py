"""Files of adversarial images, written by any library. They are starting points only: every success is checked again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from robustkit._engine.npz import NpzArray
from robustkit.data import Data
from robustkit.errors import ArgumentError

__all__ = ["SUFFIXES", "AdversarialFile", "read_adversarial_file"]

SUFFIXES: Final = (".npz", ".safetensors")
_CHUNK = 256  # images that are checked at a time
_TOLERANCE = 1e-6  # how far a value may lie outside [0, 1]: other libraries clip in another order
_FORMAT = (
    "it must contain x_adv, uint8 (N, H, W, C) or (N, H, W), or floats (N, C, H, W) in [0, 1] with NaN in rows without an "
    "adversarial image; and optionally index, success and y"
)


@final
@dataclass(frozen=True, eq=False)
class AdversarialFile:
    """The images of a file, read when they are needed.

    Attributes:
        ids: The index in the data of each row, (N,).
        success: Which rows the file marks as successes, (N,) bool; None if it does not say.
        digest: Hash of the file.
        read: Maps a range (first, last), last excluded, to these rows, (n, *S) float32 in [0, 1], NaN where there is no image.
    """

    ids: tuple[int, ...]
    success: tuple[bool, ...] | None
    digest: str
    read: Callable[[int, int], Tensor]

    def images(self, rows: list[int]) -> Tensor:
        """The images of some rows, given in ascending order, (n, *S)."""
        first = rows[0]
        return self.read(first, rows[-1] + 1)[[row - first for row in rows]]


@final
@dataclass(frozen=True, eq=False)
class _Arrays:
    """The arrays of a file: small ones in memory, the images on disk.

    Attributes:
        shape: The shape of the images.
        read: Maps a range (first, last) to these rows of the images.
        small: The arrays index, success and y, as far as the file has them.
    """

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    small: dict[str, np.ndarray]


def read_adversarial_file(name: str, data: Data, selected: range) -> AdversarialFile:
    """Open a file of adversarial images and check that it fits the data.

    Args:
        name: The path of an npz or a safetensors file.
        data: All images of the data.
        selected: The images that the run uses. A file without index has a row for each image of the data, or for each of these.

    Raises:
        ArgumentError: The file cannot be read, has no images, or has images that do not fit the data.
    """
    path = Path(name)
    if not path.is_file():
        raise ArgumentError(f"start-from={name!r}: there is no such file; paths are relative to {Path.cwd()}")
    try:
        arrays = _open_npz(path) if path.suffix == ".npz" else _open_safetensors(path)
        sample = arrays.read(0, min(1, arrays.shape[0]))
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(str(error).split())
        raise ArgumentError(f"start-from={name!r} cannot be read as plain arrays ({reason}); {_FORMAT}") from error
    ids = _example_ids(name, arrays, data, selected)
    expected = data.shape[1:]
    if tuple(sample.shape[1:]) != tuple(expected):
        raise ArgumentError(
            f"start-from={name!r}: x_adv has shape {arrays.shape}, so each image is {tuple(sample.shape[1:])}, and those of "
            f"data={data.spec!r} are {tuple(expected)}; {_FORMAT}"
        )
    _check_range(name, arrays)
    _check_labels(name, arrays, data, ids)
    success = arrays.small.get("success")
    if success is not None and (success.dtype != np.bool_ or success.shape != arrays.shape[:1]):
        raise ArgumentError(f"start-from={name!r}: success is {success.dtype} of shape {success.shape}; {_FORMAT}")
    successes = None if success is None else tuple(success.tolist())
    return AdversarialFile(tuple(ids.tolist()), successes, _digest(path), arrays.read)


def _open_npz(path: Path) -> _Arrays:
    with np.load(path, allow_pickle=False) as file:
        # `robustkit attack` writes its images as x, the name that --data reads.
        name = "x_adv" if "x_adv" in file.files or "index" not in file.files else "x"
        if name not in file.files:
            raise ValueError(f"it contains {', '.join(file.files) or 'nothing'}, but no x_adv")
        small = {key: file[key] for key in ("index", "success", "y") if key in file.files}
        stored = NpzArray(path, name)
        if stored.row_major:
            return _Arrays(stored.shape, lambda a, b: _to_float(torch.from_numpy(stored.read(a, b))), small)
        whole = torch.from_numpy(np.ascontiguousarray(file[name]))  # raises for pickled objects
    return _Arrays(tuple(whole.shape), lambda a, b: _to_float(whole[a:b]), small)


def _open_safetensors(path: Path) -> _Arrays:
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if "x_adv" not in names:
            raise ValueError(f"it contains {', '.join(sorted(names)) or 'nothing'}, but no x_adv")
        small = {key: file.get_tensor(key).numpy() for key in ("index", "success", "y") if key in names}
        shape = tuple(file.get_slice("x_adv").get_shape())

    def read(first: int, last: int) -> Tensor:
        with safe_open(str(path), framework="pt") as file:
            return _to_float(file.get_slice("x_adv")[first:last])

    return _Arrays(shape, read, small)


def _to_float(x: Tensor) -> Tensor:
    """uint8 NHWC or NHW, or floats NCHW, as float32 NCHW."""
    if x.dtype == torch.uint8:
        return (x[:, None] if x.dim() == 3 else x.movedim(-1, 1)).float() / 255
    if not x.is_floating_point():
        raise TypeError(f"x_adv is {x.dtype}")
    return x.float()


def _example_ids(name: str, arrays: _Arrays, data: Data, selected: range) -> np.ndarray:
    """The index in the data of each row, (N,) int64."""
    index, n = arrays.small.get("index"), arrays.shape[0] if arrays.shape else 0
    if index is not None:
        if index.dtype.kind not in "iu" or index.shape != (n,) or not n or index.min() < 0 or index.max() >= len(data):
            raise ArgumentError(
                f"start-from={name!r}: index must give for each of the {n} rows its example of data={data.spec!r}, as integers "
                f"in [0, {len(data)})"
            )
        return index.astype(np.int64)
    if n == len(data):
        return np.arange(n)
    if n == len(selected):
        return np.array(selected)
    raise ArgumentError(
        f"start-from={name!r} has {n} images; data={data.spec!r} has {len(data)}, and the run uses {len(selected)} of them: "
        "give one image for each, with NaN where there is none, or add an array index with the example of each row"
    )


def _check_range(name: str, arrays: _Arrays) -> None:
    for first in range(0, arrays.shape[0], _CHUNK):
        chunk = arrays.read(first, min(first + _CHUNK, arrays.shape[0]))
        outside = (chunk < -_TOLERANCE) | (chunk > 1 + _TOLERANCE)
        if outside.any():
            raise ArgumentError(f"start-from={name!r}: x_adv contains {float(chunk[outside][0]):g}, outside [0, 1]; {_FORMAT}")


def _check_labels(name: str, arrays: _Arrays, data: Data, ids: np.ndarray) -> None:
    """Compare the labels of the file, if it has any, with those of the data: they differ if the order does."""
    labels = arrays.small.get("y")
    if labels is not None and not np.array_equal(labels, data.y.numpy()[ids]):
        raise ArgumentError(
            f"start-from={name!r}: y differs from the labels of data={data.spec!r}; the file has other images or another "
            "order: give them in the order of the data, or add an array index"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
