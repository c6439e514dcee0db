"""Blocks: the results of one case on consecutive images, and their files. A block that is computed again is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustkit.bench.results.picture import Picture
from robustkit.bench.results.universal_stats import UniversalStats
from robustkit.errors import ArgumentError
from robustkit.result import Result

__all__ = ["Block", "BlockHeader", "Task", "block_errors"]

_PICTURE_FIELDS = tuple(field.name for field in fields(Picture) if field.name not in ("clean", "adversarial", "perturbation"))
_RESULT_FIELDS = ("success", "rate", "size", "forwards", "backwards", "flat", "solver")


@final
@dataclass(frozen=True)
class Task:
    """A block to compute.

    Attributes:
        case: The index of the case in the plan, from 0.
        first: The index of its first image, from 0.
        last: The index of its last image, plus one.
        name: A hash of everything that the block depends on.
    """

    case: int
    first: int
    last: int
    name: str

    @property
    def rows(self) -> slice:
        """The indices of its images."""
        return slice(self.first, self.last)


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A computed block.

    Attributes:
        task: The task.
        result: The result of the attack; its x_adv is (n, 0) unless the plan saves adversarial images.
        ids: The indices of the examples in the whole data, (n,) int64.
        labels: The true classes, (n,) int64.
        correct: Which images are classified correctly without an attack, (n,).
        robust: Which images are classified correctly both before and after the attack, (n,).
        seconds: How long it took.
        pictures: Some of the images, for the report.
        universal: The statistics of a universal perturbation; None for other attacks.
        kept_images: The images of `perturbed`, in order, (k, *S), from which other attacks may start. None if they are not
            kept, or if the result has all images.
    """

    task: Task
    result: Result
    ids: Tensor
    labels: Tensor
    correct: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    seconds: float
    pictures: tuple[Picture, ...] = ()
    universal: UniversalStats | None = None
    kept_images: Tensor | None = None

    @property
    def perturbed(self) -> Tensor:
        """On which examples the attack succeeded with a perturbation other than zero, (n,) bool."""
        return self.result.success & (self.result.size > 0)

    @property
    def adversarial(self) -> Tensor | None:
        """The adversarial images of `perturbed`, in order, (k, *S); None if they are not kept."""
        return self.result.x_adv[self.perturbed] if self.result.x_adv.shape[1:].numel() else self.kept_images

    def to_bytes(self) -> bytes:
        """The block as a safetensors file: tensors with one row per example, and metadata."""
        tensors = {name: getattr(self.result, name) for name in _RESULT_FIELDS}
        tensors |= {
            "index": self.ids,
            "label": self.labels,
            "clean": torch.from_numpy(self.correct),
            "robust": torch.from_numpy(self.robust),
        }
        if self.universal is not None:
            tensors |= self.universal.tensors()
        if self.result.x_adv.shape[1:].numel():
            tensors["x_adv"] = self.result.x_adv
        elif self.kept_images is not None:
            tensors["found"] = self.kept_images
        for name in ("clean", "adversarial") if self.pictures else ():
            tensors[f"picture_{name}"] = torch.from_numpy(np.stack([getattr(picture, name) for picture in self.pictures]))
        metadata: dict[str, Any] = self.result.to_json()
        pictures = [{name: getattr(picture, name) for name in _PICTURE_FIELDS} for picture in self.pictures]
        metadata["learned"] = None if self.universal is None else self.universal.learned
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata |= {"task": asdict(self.task), "seconds": self.seconds, "pictures": pictures, "sha256": _digest(stored)}
        return save(stored, {"robustkit": json.dumps(metadata)})

    @classmethod
    def load(cls, path: Path) -> Block:
        """Read a file that was written by `to_bytes`. No code is executed.

        Raises:
            ArgumentError: The file is missing or damaged, or is not a block.
        """
        with block_errors(path), safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["robustkit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.pop("sha256") != _digest(tensors):
                raise ValueError("its numbers are not those that were written")
            return cls._from_tensors(tensors, metadata)

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Block:
        x_adv = tensors.get("x_adv", torch.empty(len(tensors["success"]), 0))
        fields_of_result: dict[str, Any] = {name: tensors[name] for name in _RESULT_FIELDS}
        return cls(
            Task(**metadata["task"]),
            Result(x_adv, **fields_of_result, **Result.from_json(metadata)),
            tensors["index"],
            tensors["label"],
            tensors["clean"].numpy(),
            tensors["robust"].numpy(),
            metadata["seconds"],
            _pictures(tensors, metadata["pictures"]),
            UniversalStats.from_tensors(tensors, metadata.get("learned")),
            tensors.get("found"),
        )


@final
@dataclass(frozen=True, eq=False)
class BlockHeader:
    """Which adversarial images a block file has; the images themselves are not read.

    Attributes:
        path: The file.
        ids: The index in the data of each image.
        sizes: The size of each perturbation.
        digest: The hash of the content, as the file states it.
    """

    path: Path
    ids: tuple[int, ...]
    sizes: tuple[float, ...]
    digest: str

    @classmethod
    def read(cls, path: Path) -> BlockHeader | None:
        """Read the header of a block file; None if it has no images.

        Raises:
            ArgumentError: The file cannot be read, or is not a block.
        """
        with block_errors(path), safe_open(str(path), framework="pt") as file:
            if not {"found", "x_adv"} & set(file.keys()):
                return None
            digest = json.loads((file.metadata() or {})["robustkit"])["sha256"]
            ids, sizes, success = (file.get_tensor(name) for name in ("index", "size", "success"))
            perturbed = success & (sizes > 0)
            return cls(path, tuple(ids[perturbed].tolist()), tuple(sizes[perturbed].tolist()), digest)


@contextmanager
def block_errors(path: Path) -> Iterator[None]:
    """Raise the errors of reading a block file as ArgumentError, in one line."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
        raise ArgumentError(f"{str(path)!r} is not a block of a run ({error}); remove it and resume the run") from error


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pictures(tensors: dict[str, Tensor], metadata: Sequence[dict[str, Any]]) -> tuple[Picture, ...]:
    if not metadata:
        return ()
    clean, adversarial = (tensors[f"picture_{name}"].numpy() for name in ("clean", "adversarial"))
    perturbation = tensors["spread/delta"].numpy() if "spread/delta" in tensors else None
    return tuple(
        Picture(**one, clean=before, adversarial=after, perturbation=perturbation)
        for one, before, after in zip(metadata, clean, adversarial, strict=True)
    )
