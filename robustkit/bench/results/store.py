"""Stores of finished blocks: in memory, or one file per block, written atomically."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from robustkit.bench.results.block import Block, Task
from robustkit.errors import ArgumentError

__all__ = ["Files", "Memory", "Store", "block_files", "replace_file"]


def block_files(run: Path, case: int) -> list[Path]:
    """The block files of a case, in the order of their images.

    Args:
        run: The folder of a run.
        case: The index of the case, from 0.
    """
    return sorted(_folder(run / "examples", case).glob("*.safetensors"))


def _folder(examples: Path, case: int) -> Path:
    return examples / f"case-{case + 1:02d}"


class Store(ABC):
    """Keeps finished blocks."""

    @abstractmethod
    def put(self, block: Block) -> None:
        """Keep a block."""

    @abstractmethod
    def get(self, task: Task) -> Block | None:
        """The block of a task; None if there is none."""

    @property
    def shared(self) -> Store | None:
        """A store with which other processes get the same blocks; None if they cannot."""
        return None


@final
@dataclass(frozen=True)
class Memory(Store):
    """Blocks in memory, without the images that other attacks may start from, which would take too much of it."""

    blocks: dict[Task, Block] = field(default_factory=dict)

    def put(self, block: Block) -> None:
        """Keep a block."""
        self.blocks[block.task] = replace(block, kept_images=None)

    def get(self, task: Task) -> Block | None:
        """The block of a task; None if there is none."""
        return self.blocks.get(task)


@final
@dataclass(frozen=True)
class Files(Store):
    """Blocks as files, in one folder per case. An existing file is never changed.

    Attributes:
        root: The folder.
    """

    root: Path

    def path(self, task: Task) -> Path:
        """The path of the file of a block."""
        return _folder(self.root, task.case) / f"{task.first:07d}-{task.name}.safetensors"

    def put(self, block: Block) -> None:
        """Write a block."""
        path = self.path(block.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, block.to_bytes())

    def get(self, task: Task) -> Block | None:
        """The block of a task; None if its file is missing or damaged."""
        path = self.path(task)
        try:
            block = Block.load(path) if path.exists() else None
        except ArgumentError:
            return None
        return block if block is not None and block.task == task else None

    @property
    def shared(self) -> Store:
        """This store: other processes can read the files."""
        return self


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new one, never a part of it."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
