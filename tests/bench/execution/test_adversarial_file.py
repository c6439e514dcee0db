"""Starts from files that others have written: taken, brought into the threat, judged anew; or refused in one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustkit import L2, PGD, Linf, Target, zoo
from robustkit.bench import Case, Plan, read_plan, run
from robustkit.bench.execution.adversarial_file import read_foreign
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.warm_starts import read_warm_starts
from robustkit.cli import main
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError

NET, DIGITS = zoo.load("digits-mlp"), load_data("digits")
N = 40
X, Y = DIGITS.images(slice(0, N)), DIGITS.y[:N]
WORDS = ["bench", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", str(N), "--threat", "linf:0.1"]


def plan_of(*files, attack="fgsm", threat="linf:0.1", **options):
    options = {"limit": N, "block": 15} | options
    return Plan((Case("zoo:digits-mlp", threat, attack),), "digits", start_from=tuple(map(str, files)), **options)


def wrong(x):
    with torch.no_grad():
        return NET(x).argmax(1) != Y


def solved(record, name):
    return sum(stage["solved"] for stage in record["stages"] if stage["name"] == name)


@pytest.fixture(scope="module")
def theirs():
    """What foolbox finds where FGSM finds less: one image for each, its own where it failed."""
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(NET.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=40, rel_stepsize=0.1)
    torch.manual_seed(0)
    _, clipped, success = attack(model, X, Y, epsilons=0.1)
    return clipped.detach(), success


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_foolbox_has_broken_is_broken(theirs, tmp_path, suffix):
    clipped, success = theirs
    path = tmp_path / f"foolbox{suffix}"
    if suffix == ".npz":
        np.savez(path, x_adv=clipped.numpy())
    else:
        save_file({"x_adv": clipped}, path)
    (record,), (before,) = run(plan_of(path)).records, run(plan_of()).records
    with torch.no_grad():
        clean = int((NET(X).argmax(1) != Y).sum())
    # foolbox may step over eps by a rounding; brought back, an image may lose by as much.
    inside = wrong(Linf(0.1).project(clipped, X))
    assert int(success.sum()) - int(inside.sum()) in (0, 1)
    assert solved(record, "clean") + solved(record, "starts") == int(inside.sum()) > clean
    assert record["robust_accuracy"] <= 1 - float(inside.double().mean()) + 1e-12
    assert record["robust_accuracy"] < before["robust_accuracy"]


def test_rows_outside_of_the_threat_are_projected_and_judged_anew(tmp_path):
    far = PGD(steps=10)(NET.eval(), X, Y, threat=Linf(0.4)).x_adv
    np.savez(tmp_path / "far.npz", x_adv=far.numpy())
    (record,) = run(plan_of(tmp_path / "far.npz", threat="linf:0.07", save_adversarial=True)).records
    near = Linf(0.07).project(far, X)
    assert 0 < int(wrong(near).sum()) < int(wrong(far).sum())
    assert solved(record, "clean") + solved(record, "starts") == int(wrong(near).sum())


def test_another_norm_than_that_of_the_file_is_served_too(tmp_path):
    found = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv
    np.savez(tmp_path / "f.npz", x_adv=found.numpy())
    (record,) = run(plan_of(tmp_path / "f.npz", threat="l2:0.5")).records
    assert solved(record, "clean") + solved(record, "starts") == int(wrong(L2(0.5).project(found, X)).sum())


def test_bytes_are_images_over_255_channels_last(tmp_path):
    found = (PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv * 255).round().to(torch.uint8)
    for number, array in enumerate((found[:, 0], found.movedim(1, -1))):
        np.savez(tmp_path / f"{number}.npz", x_adv=array.numpy())
        (record,) = run(plan_of(tmp_path / f"{number}.npz")).records
        near = Linf(0.1).project(found.float() / 255, X)
        assert solved(record, "clean") + solved(record, "starts") == int(wrong(near).sum()) > 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_read(tmp_path, dtype):
    found = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv.to(dtype)
    save_file({"x_adv": found}, tmp_path / "f.safetensors")
    held = read_foreign(str(tmp_path / "f.safetensors"), DIGITS, range(N))
    assert torch.equal(held.images([0, 3, 39]), found[[0, 3, 39]].float())


def test_a_row_with_nan_stands_for_none_and_one_that_changes_nothing_is_not_asked_about(tmp_path):
    found = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1))
    given, right = found.x_adv.clone(), (~wrong(X)).nonzero().squeeze(1)
    broken = [row for row in right.tolist() if found.success[row]]
    given[broken[:2]], given[broken[2:4]] = torch.nan, X[broken[2:4]]
    np.savez(tmp_path / "f.npz", x_adv=given.numpy())
    (record,) = run(plan_of(tmp_path / "f.npz")).records
    changed = [row for row in right.tolist() if not given[row].isnan().any() and not torch.equal(given[row], X[row])]
    (stage,) = [stage for stage in record["stages"] if stage["name"] == "starts"]
    assert stage["forwards"] == len(changed)
    assert stage["solved"] == len(broken) - 4


def test_what_the_attack_command_writes_is_taken_as_it_is(tmp_path):
    out = tmp_path / "ours.npz"
    words = ["attack", *WORDS[1:5], "--threat", "linf:0.1", "--attack", "pgd:steps=20", "--limit", "30", "--offset", "10"]
    assert main([*words, "--out", str(out)]) == 0
    with np.load(out) as held:
        index, success = held["index"], held["success"]
    (record,) = run(plan_of(out)).records
    changed = torch.zeros(N, dtype=torch.bool)
    changed[index[success]] = True
    assert solved(record, "starts") == int((changed & ~wrong(X)).sum()) > 3
    (stage,) = [stage for stage in record["stages"] if stage["name"] == "starts"]
    assert stage["forwards"] == stage["solved"]  # what the file does not call a success is not asked about


def test_a_saved_result_is_taken_for_the_images_that_are_taken(tmp_path):
    result = PGD(steps=20)(Target(NET.eval()), X, Y, threat=Linf(0.1))
    result.save(tmp_path / "result.safetensors")
    (record,) = run(plan_of(tmp_path / "result.safetensors")).records
    assert solved(record, "clean") + solved(record, "starts") == int(result.success.sum())
    moved = PGD(steps=20)(NET.eval(), DIGITS.images(slice(5, 25)), DIGITS.y[5:25], threat=Linf(0.1))
    moved.save(tmp_path / "moved.safetensors")
    (record,) = run(plan_of(tmp_path / "moved.safetensors", offset=5, limit=20)).records
    assert solved(record, "clean") + solved(record, "starts") == int(moved.success.sum())


def test_of_two_files_the_smaller_change_and_of_any_the_one_that_is_known_to_work(tmp_path):
    attack = PGD(steps=20)
    small, large = (attack(NET.eval(), X, Y, threat=Linf(eps)) for eps in (0.08, 0.3))
    save_file({"x_adv": large.x_adv}, tmp_path / "large.safetensors")
    save_file({"x_adv": small.x_adv}, tmp_path / "small.safetensors")
    save_file({"x_adv": large.x_adv, "success": large.success}, tmp_path / "sure.safetensors")
    ids = torch.arange(N)

    def best(*names):
        finds = read_warm_starts([str(tmp_path / f"{name}.safetensors") for name in names], DIGITS, range(N))
        return finds.images("misclassify", Linf(0.1), "any", ids, X)

    changed = ((small.size > 0) & (large.size > 0)).nonzero().squeeze(1)
    assert torch.equal(best("large", "small")[changed], small.x_adv[changed])
    sure = (large.success & (large.size > 0)).nonzero().squeeze(1)
    assert torch.equal(best("small", "sure")[sure], large.x_adv[sure])


def test_the_plan_holds_the_file_and_blocks_are_named_by_it(tmp_path, capsys):
    path, out = tmp_path / "f.npz", tmp_path / "out"
    np.savez(path, x_adv=np.full((N, 1, 8, 8), np.nan, np.float32))
    assert main([*WORDS, "--attack", "fgsm", "--start-from", str(path), "--out", str(out)]) == 0
    plan = read_plan(out / "plan.toml")
    assert plan.start_from == (str(path),)
    assert len(plan.pins[f"start-from:{path}"]) == 16
    names = [task.name for task in load(plan_of(path)).tasks()]
    assert names != [task.name for task in load(plan_of()).tasks()]
    np.savez(path, x_adv=X.numpy())
    assert names != [task.name for task in load(plan_of(path)).tasks()]
    capsys.readouterr()
    assert main(["bench", "--plan", str(out / "plan.toml"), "--out", str(tmp_path / "again")]) == 2
    assert "it is not the same any more" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_does_the_same(tmp_path, workers):
    np.savez(tmp_path / "f.npz", x_adv=PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv.numpy())
    records = run(plan_of(tmp_path / "f.npz"), workers=workers).records
    for record in records:
        assert solved(record, "starts") > 5


IMAGES = np.random.default_rng(0).random((N, 1, 8, 8), dtype=np.float32)
UNFIT = {
    "no images": ({"x": IMAGES}, ("it holds x, and no x_adv",)),
    "too few": ({"x_adv": IMAGES[:7]}, ("has 7 images", "has 359, of which 40 are taken", "an array index")),
    "other images": ({"x_adv": IMAGES[:, :, :5]}, ("each image is (1, 5, 8)", "are (1, 8, 8)")),
    "a lost axis": ({"x_adv": IMAGES[:, 0]}, ("each image is (8, 8)", "are (1, 8, 8)")),
    "bytes as floats": ({"x_adv": IMAGES * 255}, ("outside [0, 1]",)),
    "infinite": ({"x_adv": np.where(IMAGES > 0.99, np.inf, IMAGES)}, ("x_adv holds inf",)),
    "whole numbers": ({"x_adv": IMAGES.astype(np.int64)}, ("torch.int64",)),
    "pickles": ({"x_adv": np.array([{}] * N, dtype=object)}, ("cannot be read as plain arrays", "allow_pickle")),
    "an index beyond": ({"x_adv": IMAGES[:2], "index": np.array([0, 359])}, ("index must say", "in [0, 359)")),
    "an index that is short": ({"x_adv": IMAGES[:2], "index": np.array([0])}, ("index must say of each of the 2 rows",)),
    "other labels": ({"x_adv": IMAGES, "y": np.roll(Y.numpy(), 1)}, ("y does not hold the labels", "another order")),
    "a success that is a number": ({"x_adv": IMAGES, "success": np.ones(N)}, ("success is float64",)),
    "nothing": ({"x_adv": IMAGES[:0]}, ("has 0 images",)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_in_one_line(name, tmp_path, capsys):
    held, told = UNFIT[name]
    np.savez(tmp_path / "f.npz", **held)
    refused([str(tmp_path / "f.npz")], told, capsys, tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_no_such_file_is_refused_in_one_line(suffix, tmp_path, capsys):
    refused([f"{tmp_path}/none{suffix}"], ("there is no such file",), capsys, tmp_path)
    (tmp_path / f"text{suffix}").write_text("text")
    refused([f"{tmp_path}/text{suffix}"], ("cannot be read as plain arrays",), capsys, tmp_path)
    (tmp_path / "file.txt").write_text("text")
    refused([f"{tmp_path}/file.txt"], ("holds no plan.toml", "npz or safetensors file with x_adv"), capsys, tmp_path)


def refused(files, told, capsys, tmp_path):
    words = [*WORDS, "--attack", "fgsm", "--out", str(tmp_path / "out"), *(w for file in files for w in ("--start-from", file))]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("start-from=", *told):
        assert part in said
    assert not (tmp_path / "out").exists()


def test_a_file_of_many_images_is_read_as_it_is_needed(tmp_path):
    """Rows of a block, not all."""
    np.savez(tmp_path / "f.npz", x_adv=IMAGES)
    held = read_foreign(str(tmp_path / "f.npz"), DIGITS, range(N))
    asked = []
    inner = held.read

    def spy(first, last):
        asked.append((first, last))
        return inner(first, last)

    object.__setattr__(held, "read", spy)
    assert torch.equal(held.images([3, 5]), torch.from_numpy(IMAGES[[3, 5]]))
    assert asked == [(3, 6)]
    with pytest.raises(ArgumentError, match="has 40 images"):
        read_foreign(str(tmp_path / "f.npz"), DIGITS, range(7))
