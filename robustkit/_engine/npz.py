"""An array inside an npz file, read row by row as it is needed, so that it need not fit into memory."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, final
from weakref import finalize

import numpy as np
from numpy.lib import format as npy

from robustkit.errors import ArgumentError

__all__ = ["Stored"]


@final
class Stored:
    """The rows of one array of an npz file, compressed or not. Only plain numbers are read, nothing is ever unpickled.

    Attributes:
        shape: (N, *S).
        dtype: Of the numbers.
        by_rows: Whether the file holds whole rows one after another; else they cannot be read one by one.
    """

    def __init__(self, path: Path, name: str) -> None:
        archive = zipfile.ZipFile(path)
        self._path, self._raw = path, archive.fp
        self._state = self._stat()
        self._file = archive.open(f"{name}.npy")
        finalize(self, _close, self._file, archive)
        version = npy.read_magic(self._file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        self.shape, columns_first, self.dtype = header(self._file)
        self._start = self._file.tell()
        self.by_rows = not columns_first and not self.dtype.hasobject and len(self.shape) > 0

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` on and before `last`, (last - first, *S), as an array of its own."""
        if self._stat() != self._state:
            raise ArgumentError(f"{self._path} has changed while it was read; leave it as it is during a run, and begin anew")
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._file.seek(self._start + first * size)  # forwards it reads on, backwards it begins anew
        held = self._file.read((last - first) * size)
        return np.frombuffer(held, self.dtype).reshape(last - first, *self.shape[1:]).copy()

    def _stat(self) -> tuple[int, int]:
        assert self._raw is not None
        told = os.fstat(self._raw.fileno())
        return told.st_size, told.st_mtime_ns


def _close(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    file.close()
    archive.close()
