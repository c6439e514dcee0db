"""Where finished blocks are: in memory, or one file each, which is there whole or not at all."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from robustkit.bench.results.block import Block, Task
from robustkit.errors import ArgumentError

__all__ = ["Files", "Memory", "Store", "files_of", "replace_file"]


def files_of(run: Path, case: int) -> list[Path]:
    """The files of the blocks of a case, from 0, in the folder of a run, in the order of their images."""
    return sorted(_folder(run / "examples", case).glob("*.safetensors"))


def _folder(examples: Path, case: int) -> Path:
    return examples / f"case-{case + 1:02d}"


class Store(ABC):
    """Keeps blocks."""

    @abstractmethod
    def put(self, block: Block) -> None:
        """Keep a block."""

    @abstractmethod
    def get(self, task: Task) -> Block | None:
        """The block, if it is here."""

    @property
    def shared(self) -> Store | None:
        """By what other processes find the same blocks; None where they cannot."""
        return None


@final
@dataclass(frozen=True)
class Memory(Store):
    """Blocks in memory, without the images from which other attacks may start: those would fill it."""

    blocks: dict[Task, Block] = field(default_factory=dict)

    def put(self, block: Block) -> None:
        """Keep a block."""
        self.blocks[block.task] = replace(block, found=None)

    def get(self, task: Task) -> Block | None:
        """The block, if it is here."""
        return self.blocks.get(task)


@final
@dataclass(frozen=True)
class Files(Store):
    """Blocks as files, in a folder for each case; a file that is there is never touched again.

    Attributes:
        root: The folder.
    """

    root: Path

    def path(self, task: Task) -> Path:
        """Where the block is, or would be."""
        return _folder(self.root, task.case) / f"{task.first:07d}-{task.name}.safetensors"

    def put(self, block: Block) -> None:
        """Write a block."""
        path = self.path(block.task)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, block.bytes())

    def get(self, task: Task) -> Block | None:
        """The block, if it is here and whole; a damaged one is as good as none."""
        path = self.path(task)
        try:
            block = Block.load(path) if path.exists() else None
        except ArgumentError:
            return None
        return block if block is not None and block.task == task else None

    @property
    def shared(self) -> Store:
        """Itself: files are there for all."""
        return self


def replace_file(path: Path, content: bytes) -> None:
    """Write aside and rename: whoever looks finds the old file or the new one, never half of it."""
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
