"""Adversarial images in a file that any library may have written: where attacks may begin, nothing more is believed of them."""

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

__all__ = ["SUFFIXES", "Foreign", "read_foreign"]

SUFFIXES: Final = (".npz", ".safetensors")
_AT_ONCE = 256  # images that are looked at together
_SLACK = 1e-6  # by so much an image may leave [0, 1]: other libraries clip in other orders
_RULE = (
    "it must hold x_adv, uint8 (N, H, W, C) or (N, H, W), or floats (N, C, H, W) in [0, 1] with NaN in the rows that have "
    "none; and, if wanted, index, success and y"
)


@final
@dataclass(frozen=True, eq=False)
class Foreign:
    """The images of a file; they stay in it until they are asked for.

    Attributes:
        ids: Which example of the data each row is for, (N,).
        success: Which rows the writer calls successes, (N,) bool; None where it does not say.
        digest: Of the file.
        read: Rows from the first to before the last, (n, *S) float32 in [0, 1], NaN where there is none.
    """

    ids: tuple[int, ...]
    success: tuple[bool, ...] | None
    digest: str
    read: Callable[[int, int], Tensor]

    def images(self, rows: list[int]) -> Tensor:
        """Some rows in ascending order, (n, *S)."""
        first = rows[0]
        return self.read(first, rows[-1] + 1)[[row - first for row in rows]]


@final
@dataclass(frozen=True, eq=False)
class _File:
    """The arrays of a file by name: the small ones read, the images where they are.

    Attributes:
        shape: Of the images.
        rows: Reads some of them.
        small: index, success and y, where they are there.
    """

    shape: tuple[int, ...]
    rows: Callable[[int, int], Tensor]
    small: dict[str, np.ndarray]


def read_foreign(name: str, data: Data, taken: range) -> Foreign:
    """What a file holds for these data.

    Args:
        name: An npz or a safetensors file.
        data: All the images.
        taken: Which of them a run takes; a file without index has a row for each of all, or for each of these.

    Raises:
        ArgumentError: It cannot be read, holds no images, or holds images that do not fit the data.
    """
    path = Path(name)
    if not path.is_file():
        raise ArgumentError(f"start-from={name!r}: there is no such file; paths are relative to {Path.cwd()}")
    try:
        held = _npz(path) if path.suffix == ".npz" else _safetensors(path)
        sample = held.rows(0, min(1, held.shape[0]))
    except Exception as error:  # a damaged file may raise anything
        told = " ".join(str(error).split())
        raise ArgumentError(f"start-from={name!r} cannot be read as plain arrays ({told}); {_RULE}") from error
    ids = _ids(name, held, data, taken)
    wanted = data.shape[1:]
    if tuple(sample.shape[1:]) != tuple(wanted):
        raise ArgumentError(
            f"start-from={name!r}: x_adv has shape {held.shape}, so each image is {tuple(sample.shape[1:])}, and those of "
            f"data={data.spec!r} are {tuple(wanted)}; {_RULE}"
        )
    _check_range(name, held)
    _check_labels(name, held, data, ids)
    success = held.small.get("success")
    if success is not None and (success.dtype != np.bool_ or success.shape != held.shape[:1]):
        raise ArgumentError(f"start-from={name!r}: success is {success.dtype} of shape {success.shape}; {_RULE}")
    return Foreign(tuple(ids.tolist()), None if success is None else tuple(success.tolist()), _digest(path), held.rows)


def _npz(path: Path) -> _File:
    with np.load(path, allow_pickle=False) as file:
        # What `robustkit attack` writes has its images under the name by which --data reads them.
        name = "x_adv" if "x_adv" in file.files or "index" not in file.files else "x"
        if name not in file.files:
            raise ValueError(f"it holds {', '.join(file.files) or 'nothing'}, and no x_adv")
        small = {key: file[key] for key in ("index", "success", "y") if key in file.files}
        stored = NpzArray(path, name)
        if stored.row_major:
            return _File(stored.shape, lambda a, b: _images(torch.from_numpy(stored.read(a, b))), small)
        whole = torch.from_numpy(np.ascontiguousarray(file[name]))  # pickled objects are refused here
    return _File(tuple(whole.shape), lambda a, b: _images(whole[a:b]), small)


def _safetensors(path: Path) -> _File:
    with safe_open(str(path), framework="pt") as file:
        names = set(file.keys())
        if "x_adv" not in names:
            raise ValueError(f"it holds {', '.join(sorted(names)) or 'nothing'}, and no x_adv")
        small = {key: file.get_tensor(key).numpy() for key in ("index", "success", "y") if key in names}
        shape = tuple(file.get_slice("x_adv").get_shape())

    def rows(first: int, last: int) -> Tensor:
        with safe_open(str(path), framework="pt") as file:
            return _images(file.get_slice("x_adv")[first:last])

    return _File(shape, rows, small)


def _images(x: Tensor) -> Tensor:
    """uint8 NHWC or NHW, or floats NCHW, as float32 NCHW."""
    if x.dtype == torch.uint8:
        return (x[:, None] if x.dim() == 3 else x.movedim(-1, 1)).float() / 255
    if not x.is_floating_point():
        raise TypeError(f"x_adv is {x.dtype}")
    return x.float()


def _ids(name: str, held: _File, data: Data, taken: range) -> np.ndarray:
    """Which example each row is for."""
    index, n = held.small.get("index"), held.shape[0] if held.shape else 0
    if index is not None:
        if index.dtype.kind not in "iu" or index.shape != (n,) or not n or index.min() < 0 or index.max() >= len(data):
            raise ArgumentError(
                f"start-from={name!r}: index must say of each of the {n} rows which example of data={data.spec!r} it is, whole "
                f"numbers in [0, {len(data)})"
            )
        return index.astype(np.int64)
    if n == len(data):
        return np.arange(n)
    if n == len(taken):
        return np.array(taken)
    raise ArgumentError(
        f"start-from={name!r} has {n} images; data={data.spec!r} has {len(data)}, of which {len(taken)} are taken: give one "
        "for each, with NaN where there is none, or an array index that says which example each row is"
    )


def _check_range(name: str, held: _File) -> None:
    for first in range(0, held.shape[0], _AT_ONCE):
        piece = held.rows(first, min(first + _AT_ONCE, held.shape[0]))
        outside = (piece < -_SLACK) | (piece > 1 + _SLACK)
        if outside.any():
            raise ArgumentError(f"start-from={name!r}: x_adv holds {float(piece[outside][0]):g}, outside [0, 1]; {_RULE}")


def _check_labels(name: str, held: _File, data: Data, ids: np.ndarray) -> None:
    """Labels beside the images tell whether these are in the order of the data."""
    labels = held.small.get("y")
    if labels is not None and not np.array_equal(labels, data.y.numpy()[ids]):
        raise ArgumentError(
            f"start-from={name!r}: y does not hold the labels of data={data.spec!r}; the images are others, or in another "
            "order: give them in the order of the data, or an array index"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
