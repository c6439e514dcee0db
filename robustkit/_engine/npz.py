"""Arrays of npz files, read by slices of rows on demand, so that they need not fit into memory."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, final
from weakref import finalize

import numpy as np
from numpy.lib import format as npy

from robustkit.errors import ArgumentError

__all__ = ["NpzArray"]


@final
class NpzArray:
    """One array of an npz file, compressed or not. Only plain numbers are read; nothing is ever unpickled.

    Attributes:
        shape: (N, *S).
        dtype: The dtype of the array.
        row_major: Whether the file holds plain numbers row after row; only such arrays can be read by rows.
    """

    def __init__(self, path: Path, name: str) -> None:
        archive = zipfile.ZipFile(path)
        self._path, self._raw = path, archive.fp
        self._state = self._stat()
        self._file = archive.open(f"{name}.npy")
        finalize(self, _close, self._file, archive)
        version = npy.read_magic(self._file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        self.shape, fortran_order, self.dtype = header(self._file)
        self._start = self._file.tell()
        self.row_major = not fortran_order and not self.dtype.hasobject and len(self.shape) > 0

    def __len__(self) -> int:
        return int(self.shape[0])

    def read(self, first: int, last: int) -> np.ndarray:
        """The rows [first, last), (last - first, *S), as a new array.

        Raises:
            ArgumentError: The file has changed since it was opened.
        """
        if self._stat() != self._state:
            raise ArgumentError(f"{self._path} has changed while it was read; do not write to it during a run, and start again")
        size = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._file.seek(self._start + first * size)  # in a compressed file, seeking backwards decompresses from the start
        data = self._file.read((last - first) * size)
        return np.frombuffer(data, self.dtype).reshape(last - first, *self.shape[1:]).copy()

    def _stat(self) -> tuple[int, int]:
        """Size and modification time of the file."""
        assert self._raw is not None
        stat = os.fstat(self._raw.fileno())
        return stat.st_size, stat.st_mtime_ns


def _close(file: IO[bytes], archive: zipfile.ZipFile) -> None:
    file.close()
    archive.close()
