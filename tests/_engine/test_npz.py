"""Rows of an npz array equal those of the array in memory, in any order; nothing is unpickled."""

import gc
import io
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustkit._engine.npz import NpzArray
from robustkit.data import load

X = np.random.default_rng(0).random((300, 1, 4, 5), dtype=np.float32)
BYTES = np.random.default_rng(1).integers(0, 256, (300, 4, 5, 3), dtype=np.uint8)
Y = np.arange(300) % 7


@pytest.fixture(scope="module", params=[np.savez, np.savez_compressed])
def files(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("npz")
    request.param(folder / "floats.npz", x=X, y=Y)
    request.param(folder / "bytes.npz", x=BYTES, y=Y)
    request.param(folder / "columns.npz", x=np.asfortranarray(X), y=Y)
    return folder


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6))
def test_rows_in_any_order_equal_those_of_the_array(files, ranges):
    array = NpzArray(files / "floats.npz", "x")
    assert (array.shape, array.dtype, len(array), array.row_major) == (X.shape, X.dtype, 300, True)
    for pair in ranges:
        first, last = sorted(pair)
        assert np.array_equal(array.read(first, last), X[first:last])


@pytest.mark.parametrize(("name", "whole"), [("floats", X), ("bytes", BYTES.transpose(0, 3, 1, 2) / np.float32(255))])
def test_data_in_a_file_equal_data_in_memory(files, name, whole):
    data, memory = load(f"npz:{files}/{name}.npz"), torch.from_numpy(whole.copy())
    assert isinstance(data.source, NpzArray)
    assert torch.equal(data.x, memory)
    assert data.shape == memory.shape
    part = data.part(20, 270).part(5, 100)
    assert torch.equal(part.x, memory[25:125])
    assert torch.equal(part.y, torch.from_numpy(Y[25:125]))
    assert torch.equal(part.images(slice(90, 300)), memory[115:125])
    in_memory = type(data)(memory, torch.from_numpy(Y), data.classes, data.spec)
    assert data.hash == in_memory.hash
    assert part.hash == in_memory.part(20, 270).part(5, 100).hash != data.hash


def test_an_array_in_fortran_order_is_read_as_a_whole(files):
    assert not NpzArray(files / "columns.npz", "x").row_major
    data = load(f"npz:{files}/columns.npz")
    assert isinstance(data.source, torch.Tensor)
    assert torch.equal(data.x, torch.from_numpy(X))


def test_the_range_of_all_images_is_checked(files, tmp_path):
    for value in (np.nan, 1.5, -0.5, np.inf):
        wrong = X.copy()
        wrong[-1, 0, 3, 4] = value
        np.savez(tmp_path / "wrong.npz", x=wrong, y=Y)
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            load(f"npz:{tmp_path}/wrong.npz")


def test_the_file_is_closed_with_its_last_user(files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(f"npz:{files}/floats.npz")
        part = data.part(3, 4)
        del data
        gc.collect()
        assert torch.equal(part.x, torch.from_numpy(X[3:7]))
        del part
        gc.collect()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(tmp_path, version):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, X, version=version)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue())
    assert np.array_equal(NpzArray(tmp_path / "x.npz", "x").read(7, 11), X[7:11])
