"""What a run is made of: some images of one case, attacked, judged and written down; done again it is the same."""

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

__all__ = ["Block", "BlockHeader", "Task"]

_WORDS = tuple(field.name for field in fields(Picture) if field.name not in ("clean", "adversarial", "perturbation"))
_FACTS = ("success", "rate", "size", "forwards", "backwards", "flat", "solver")


@final
@dataclass(frozen=True)
class Task:
    """A block that is wanted.

    Attributes:
        case: Which case of the plan, from 0.
        first: The first of its images, from 0.
        last: The one after its last image.
        name: A hash of all that its outcome depends on.
    """

    case: int
    first: int
    last: int
    name: str

    @property
    def rows(self) -> slice:
        """Its images."""
        return slice(self.first, self.last)


@final
@dataclass(frozen=True, eq=False)
class Block:
    """A block that is done.

    Attributes:
        task: What was wanted.
        result: What the attack came to; without its images, (n, 0), unless they are to be kept.
        ids: Which examples of the data these are, (n,) int64, whatever the plan has passed over.
        labels: The true classes, (n,) int64.
        clean: Which images are right without an attack, (n,).
        robust: Which are right both before and after it, (n,).
        seconds: How long it took.
        pictures: Some of the images, to look at.
        spread: What a universal perturbation did to the predictions; None for other attacks.
        found: The images of `changed`, in order, (k, *S), from which other attacks may start; None where they are not kept,
            or where the result has all.
    """

    task: Task
    result: Result
    ids: Tensor
    labels: Tensor
    clean: NDArray[np.bool_]
    robust: NDArray[np.bool_]
    seconds: float
    pictures: tuple[Picture, ...] = ()
    spread: UniversalStats | None = None
    found: Tensor | None = None

    @property
    def changed(self) -> Tensor:
        """On which examples the attack succeeded by a change of the image, (n,) bool."""
        return self.result.success & (self.result.size > 0)

    @property
    def images(self) -> Tensor | None:
        """The adversarial images of `changed`, in order, (k, *S), if they are kept."""
        return self.result.x_adv[self.changed] if self.result.x_adv.shape[1:].numel() else self.found

    def bytes(self) -> bytes:
        """Everything as one safetensors file, the row of each example under plain names."""
        tensors = {name: getattr(self.result, name) for name in _FACTS}
        tensors |= {
            "index": self.ids,
            "label": self.labels,
            "clean": torch.from_numpy(self.clean),
            "robust": torch.from_numpy(self.robust),
        }
        if self.spread is not None:
            tensors |= self.spread.tensors()
        if self.result.x_adv.shape[1:].numel():
            tensors["x_adv"] = self.result.x_adv
        elif self.found is not None:
            tensors["found"] = self.found
        for name in ("clean", "adversarial") if self.pictures else ():
            tensors[f"picture_{name}"] = torch.from_numpy(np.stack([getattr(picture, name) for picture in self.pictures]))
        told: dict[str, Any] = self.result.to_json()
        words = [{name: getattr(picture, name) for name in _WORDS} for picture in self.pictures]
        told["learned"] = None if self.spread is None else self.spread.learned
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        told |= {"task": asdict(self.task), "seconds": self.seconds, "pictures": words, "sha256": _digest(held)}
        return save(held, {"robustkit": json.dumps(told)})

    @classmethod
    def load(cls, path: Path) -> Block:
        """Read what `bytes` gave; no code is executed.

        Raises:
            ArgumentError: The file is missing, damaged, or no block.
        """
        with _readable(path), safe_open(str(path), framework="pt") as file:
            told = json.loads((file.metadata() or {})["robustkit"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if told.pop("sha256") != _digest(held):
                raise ValueError("its numbers are not those that were written")
            return cls._of(held, told)

    @classmethod
    def _of(cls, held: dict[str, Tensor], told: dict[str, Any]) -> Block:
        x_adv = held.get("x_adv", torch.empty(len(held["success"]), 0))
        facts: dict[str, Any] = {name: held[name] for name in _FACTS}
        result = Result(x_adv, **facts, **Result.from_json(told))
        pictures = _pictures(held, told["pictures"])
        masks = held["clean"].numpy(), held["robust"].numpy()
        spread = UniversalStats.of(held, told.get("learned"))
        return cls(
            Task(**told["task"]),
            result,
            held["index"],
            held["label"],
            *masks,
            told["seconds"],
            pictures,
            spread,
            held.get("found"),
        )


@final
@dataclass(frozen=True, eq=False)
class BlockHeader:
    """Which adversarial images a file keeps, known without reading them.

    Attributes:
        path: The file.
        ids: Which examples of the data they belong to.
        sizes: How large the changes are.
        digest: Of all that the file holds, as it says itself.
    """

    path: Path
    ids: tuple[int, ...]
    sizes: tuple[float, ...]
    digest: str

    @classmethod
    def of(cls, path: Path) -> BlockHeader | None:
        """A look at a file; None where it keeps no images at all.

        Raises:
            ArgumentError: It cannot be read, or is no block.
        """
        with _readable(path), safe_open(str(path), framework="pt") as file:
            if not {"found", "x_adv"} & set(file.keys()):
                return None
            digest = json.loads((file.metadata() or {})["robustkit"])["sha256"]
            ids, sizes, success = (file.get_tensor(name) for name in ("index", "size", "success"))
            changed = success & (sizes > 0)
            return cls(path, tuple(ids[changed].tolist()), tuple(sizes[changed].tolist()), digest)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong while a block is read, in one line."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArgumentError(f"{str(path)!r} is no block of a run ({error}); remove it and resume the run") from error


def _digest(held: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(held):
        digest.update(f"{name}{held[name].dtype}{tuple(held[name].shape)}".encode())
        digest.update(held[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pictures(held: dict[str, Tensor], words: Sequence[dict[str, Any]]) -> tuple[Picture, ...]:
    if not words:
        return ()
    clean, adversarial = (held[f"picture_{name}"].numpy() for name in ("clean", "adversarial"))
    change = held["spread/delta"].numpy() if "spread/delta" in held else None
    return tuple(
        Picture(**word, clean=before, adversarial=after, perturbation=change)
        for word, before, after in zip(words, clean, adversarial, strict=True)
    )
