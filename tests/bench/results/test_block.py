"""Blocks: files that keep every bit, names that depend on everything that is computed, and damaged files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robustkit.bench import Case, Plan
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.results.block import Block, BlockHeader
from robustkit.bench.results.store import Files, Memory, replace_file
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError

CASES = (Case("zoo:digits-mlp", "linf:0.1", "pgd:steps=3"), Case("zoo:digits-mlp", "linf:0.1", "fgsm", "least-likely"))
PLAN = Plan(CASES, "digits", offset=7, limit=25, block=10)
LOADED = load(PLAN)


def same(a, b):
    for name in ("success", "rate", "size", "forwards", "backwards", "flat", "x_adv"):
        assert torch.equal(getattr(a.result, name), getattr(b.result, name)), name
        assert getattr(a.result, name).dtype == getattr(b.result, name).dtype
    for name in ("flags", "notes", "stages"):
        assert getattr(a.result, name) == getattr(b.result, name)
    assert torch.equal(a.adversarial, b.adversarial)
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a.ids, b.ids)
    assert (a.correct == b.correct).all()
    assert (a.robust == b.robust).all()
    assert (a.task, a.seconds, len(a.pictures)) == (b.task, b.seconds, len(b.pictures))
    for one, other in zip(a.pictures, b.pictures, strict=True):
        for name, value in vars(one).items():
            assert np.array_equal(value, getattr(other, name)), name


@pytest.mark.parametrize("save", [False, True])
def test_a_block_that_is_written_and_read_is_equal(tmp_path, save):
    loaded = load(replace(PLAN, save_adversarial=save))
    for task in loaded.tasks():
        block = loaded.measure(task)
        Files(tmp_path).put(block)
        same(Files(tmp_path).get(task), block)
        assert block.result.x_adv.shape[1:].numel() == (64 if save else 0)
        # The images of successes with a perturbation are always kept, in one place.
        assert (block.kept_images is None) == save
        assert len(block.adversarial) == len(BlockHeader.read(Files(tmp_path).path(task)).ids) == int(block.perturbed.sum())
        assert block.perturbed.any() or task.case == 1
        assert len(block.pictures) == (4 if task.first == 0 else 0)


def test_a_block_that_is_computed_again_is_equal_except_for_its_seconds():
    for task in LOADED.tasks():
        first, again = (replace(LOADED.measure(task), seconds=0.0) for _ in range(2))
        same(first, again)


def test_a_file_has_one_row_per_example(tmp_path):
    data = load_data("digits")
    for task in LOADED.tasks():
        Files(tmp_path).put(LOADED.measure(task))
    files = sorted((tmp_path / "case-01").iterdir())
    assert [file.name.partition("-")[0] for file in files] == ["0000000", "0000010", "0000020"]
    tensors = [load_file(file) for file in files]
    index = torch.cat([file["index"] for file in tensors])
    assert index.tolist() == list(range(7, 32))
    assert torch.equal(torch.cat([file["label"] for file in tensors]), data.y[index])
    robust = torch.cat([file["robust"] for file in tensors])
    assert robust.tolist() == next(iter(outcomes(LOADED))).robust.tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"offset": 8},
        {"limit": 24},
        {"block": 5},
        {"batch_size": 3},
        {"threads": 2},
        {"save_adversarial": True},
        {"data": "digits:train"},
        {"cases": tuple(replace(case, model="zoo:digits-mlp@weights=w.safetensors") for case in CASES)},
        {"cases": tuple(replace(case, threat="linf:0.2") for case in CASES)},
        {"cases": tuple(replace(case, attack="pgd:steps=4") for case in CASES)},
        {"cases": tuple(replace(case, goal="classify-as:3") for case in CASES)},
    ],
    ids=str,
)
def test_the_name_of_a_block_depends_on_everything_that_it_computes(change, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    from robustkit import zoo

    monkeypatch.chdir(tmp_path)
    weights = {name: tensor + 0.001 for name, tensor in zoo.load("digits-mlp").state_dict().items()}
    save_file(weights, "w.safetensors")
    if "offset" in change:
        names = {task.first: task.name for task in LOADED.tasks() if task.case == 0}
        changed = {task.first: task.name for task in load(replace(PLAN, **change)).tasks() if task.case == 0}
        assert names.keys() == changed.keys()
    names = {task.name for task in LOADED.tasks()}
    other = load(replace(PLAN, **change)).tasks()
    # With another limit the data and their hash are different.
    assert not names & {task.name for task in other}


def test_equal_plans_have_equal_blocks():
    assert LOADED.tasks() == load(PLAN).tasks() == load(LOADED.plan).tasks()
    again = Plan(CASES[::-1], "digits", offset=7, limit=25, block=10)
    assert {task.name for task in load(again).tasks()} == {task.name for task in LOADED.tasks()}


def test_the_first_block_of_every_case_comes_first():
    order = [(task.case, task.first, task.last) for task in LOADED.tasks()]
    assert order[:2] == [(0, 0, 10), (1, 0, 10)]
    assert order[2:] == [(case, first, last) for case in (0, 1) for first, last in ((10, 20), (20, 25))]


def test_a_damaged_block_is_not_used(tmp_path):
    store, task = Files(tmp_path), LOADED.tasks()[0]
    assert store.get(task) is None
    store.put(LOADED.measure(task))
    whole = store.path(task).read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"x" * 100, whole.replace(b"robust", b"xobust")):
        store.path(task).write_bytes(damaged)
        assert store.get(task) is None
        with pytest.raises(ArgumentError, match=r"is not a block of a run .* remove it and resume the run"):
            Block.load(store.path(task))


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


class Forgetful(Memory):
    """A store that loses its blocks."""

    def put(self, block):
        pass


def test_a_missing_block_is_reported():
    with pytest.raises(Exception, match=r"block [0-9a-f]{16} of case 1 is missing or damaged; resume the run"):
        list(outcomes(LOADED, Forgetful()))


def test_outcomes_depend_neither_on_stored_blocks_nor_on_the_order():
    class Backwards:
        def run(self, make, tasks):
            function = make()
            return (function(task) for task in reversed(tasks))

    store = Memory()
    for task in LOADED.tasks()[1::2]:
        store.put(LOADED.measure(task))
    stored = []
    mixed = sorted(outcomes(LOADED, store, Backwards(), lambda block, old: stored.append(old)), key=lambda o: o.index)
    plain = sorted(outcomes(LOADED), key=lambda o: o.index)
    assert stored == [True] * 3 + [False] * 3
    for one, other in zip(mixed, plain, strict=True):
        assert {**one.record, "seconds": 0} == {**other.record, "seconds": 0}
        assert (one.robust == other.robust).all()
        assert [p.index for p in one.pictures] == [p.index for p in other.pictures]
