"""Warm starts from files of other programs: they are projected and checked again, or refused in one line."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustkit import L2, PGD, Linf, Target, zoo
from robustkit.bench import Case, Plan, read_plan, run
from robustkit.bench.execution.adversarial_file import read_adversarial_file
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
def foolbox_images():
    """What an attack of foolbox, stronger than FGSM, returns: an image for each example, also where it failed."""
    foolbox = pytest.importorskip("foolbox")
    model = foolbox.PyTorchModel(NET.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=40, rel_stepsize=0.1)
    torch.manual_seed(0)
    _, clipped, success = attack(model, X, Y, epsilons=0.1)
    return clipped.detach(), success


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_successes_of_foolbox_are_successes_of_the_run(foolbox_images, tmp_path, suffix):
    clipped, success = foolbox_images
    path = tmp_path / f"foolbox{suffix}"
    if suffix == ".npz":
        np.savez(path, x_adv=clipped.numpy())
    else:
        save_file({"x_adv": clipped}, path)
    (record,), (before,) = run(plan_of(path)).records, run(plan_of()).records
    with torch.no_grad():
        clean = int((NET(X).argmax(1) != Y).sum())
    # foolbox may exceed eps by a rounding error, and an image may fail after projection.
    inside = wrong(Linf(0.1).project(clipped, X))
    assert int(success.sum()) - int(inside.sum()) in (0, 1)
    assert solved(record, "clean") + solved(record, "starts") == int(inside.sum()) > clean
    assert record["robust_accuracy"] <= 1 - float(inside.double().mean()) + 1e-12
    assert record["robust_accuracy"] < before["robust_accuracy"]


def test_rows_outside_of_the_threat_are_projected_and_checked_again(tmp_path):
    far = PGD(steps=10)(NET.eval(), X, Y, threat=Linf(0.4)).x_adv
    np.savez(tmp_path / "far.npz", x_adv=far.numpy())
    (record,) = run(plan_of(tmp_path / "far.npz", threat="linf:0.07", save_adversarial=True)).records
    near = Linf(0.07).project(far, X)
    assert 0 < int(wrong(near).sum()) < int(wrong(far).sum())
    assert solved(record, "clean") + solved(record, "starts") == int(wrong(near).sum())


def test_a_file_made_for_another_norm_can_be_used(tmp_path):
    x_adv = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv
    np.savez(tmp_path / "f.npz", x_adv=x_adv.numpy())
    (record,) = run(plan_of(tmp_path / "f.npz", threat="l2:0.5")).records
    assert solved(record, "clean") + solved(record, "starts") == int(wrong(L2(0.5).project(x_adv, X)).sum())


def test_uint8_arrays_are_divided_by_255_and_have_channels_last(tmp_path):
    x_adv = (PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv * 255).round().to(torch.uint8)
    for number, array in enumerate((x_adv[:, 0], x_adv.movedim(1, -1))):
        np.savez(tmp_path / f"{number}.npz", x_adv=array.numpy())
        (record,) = run(plan_of(tmp_path / f"{number}.npz")).records
        near = Linf(0.1).project(x_adv.float() / 255, X)
        assert solved(record, "clean") + solved(record, "starts") == int(wrong(near).sum()) > 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_point_types_are_read(tmp_path, dtype):
    x_adv = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv.to(dtype)
    save_file({"x_adv": x_adv}, tmp_path / "f.safetensors")
    file = read_adversarial_file(str(tmp_path / "f.safetensors"), DIGITS, range(N))
    assert torch.equal(file.images([0, 3, 39]), x_adv[[0, 3, 39]].float())


def test_rows_with_nan_and_rows_equal_to_the_image_are_skipped(tmp_path):
    result = PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1))
    given, correct = result.x_adv.clone(), (~wrong(X)).nonzero().squeeze(1)
    broken = [row for row in correct.tolist() if result.success[row]]
    given[broken[:2]], given[broken[2:4]] = torch.nan, X[broken[2:4]]
    np.savez(tmp_path / "f.npz", x_adv=given.numpy())
    (record,) = run(plan_of(tmp_path / "f.npz")).records
    changed = [row for row in correct.tolist() if not given[row].isnan().any() and not torch.equal(given[row], X[row])]
    (stage,) = [stage for stage in record["stages"] if stage["name"] == "starts"]
    assert stage["forwards"] == len(changed)
    assert stage["solved"] == len(broken) - 4


def test_the_output_of_the_attack_command_can_be_used(tmp_path):
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
    assert stage["forwards"] == stage["solved"]  # rows that the file does not mark as successes are not queried


def test_a_saved_result_belongs_to_the_images_of_the_run(tmp_path):
    result = PGD(steps=20)(Target(NET.eval()), X, Y, threat=Linf(0.1))
    result.save(tmp_path / "result.safetensors")
    (record,) = run(plan_of(tmp_path / "result.safetensors")).records
    assert solved(record, "clean") + solved(record, "starts") == int(result.success.sum())
    moved = PGD(steps=20)(NET.eval(), DIGITS.images(slice(5, 25)), DIGITS.y[5:25], threat=Linf(0.1))
    moved.save(tmp_path / "moved.safetensors")
    (record,) = run(plan_of(tmp_path / "moved.safetensors", offset=5, limit=20)).records
    assert solved(record, "clean") + solved(record, "starts") == int(moved.success.sum())


def test_known_successes_come_first_and_then_the_smaller_perturbation(tmp_path):
    attack = PGD(steps=20)
    small, large = (attack(NET.eval(), X, Y, threat=Linf(eps)) for eps in (0.08, 0.3))
    save_file({"x_adv": large.x_adv}, tmp_path / "large.safetensors")
    save_file({"x_adv": small.x_adv}, tmp_path / "small.safetensors")
    save_file({"x_adv": large.x_adv, "success": large.success}, tmp_path / "sure.safetensors")
    ids = torch.arange(N)

    def best(*names):
        warm_starts = read_warm_starts([str(tmp_path / f"{name}.safetensors") for name in names], DIGITS, range(N))
        return warm_starts.starting_points("misclassify", Linf(0.1), "any", ids, X)

    changed = ((small.size > 0) & (large.size > 0)).nonzero().squeeze(1)
    assert torch.equal(best("large", "small")[changed], small.x_adv[changed])
    sure = (large.success & (large.size > 0)).nonzero().squeeze(1)
    assert torch.equal(best("small", "sure")[sure], large.x_adv[sure])


def test_the_plan_records_the_file_and_block_names_depend_on_it(tmp_path, capsys):
    path, out = tmp_path / "f.npz", tmp_path / "out"
    np.savez(path, x_adv=np.full((N, 1, 8, 8), np.nan, np.float32))
    assert main([*WORDS, "--attack", "fgsm", "--start-from", str(path), "--out", str(out)]) == 0
    plan = read_plan(out / "plan.toml")
    assert plan.start_from == (str(path),)
    assert len(plan.expected_hashes[f"start-from:{path}"]) == 16
    names = [task.name for task in load(plan_of(path)).tasks()]
    assert names != [task.name for task in load(plan_of()).tasks()]
    np.savez(path, x_adv=X.numpy())
    assert names != [task.name for task in load(plan_of(path)).tasks()]
    capsys.readouterr()
    assert main(["bench", "--plan", str(out / "plan.toml"), "--out", str(tmp_path / "again")]) == 2
    assert "it has changed, or is not reproducible" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_starts_are_used_with_any_number_of_workers(tmp_path, workers):
    np.savez(tmp_path / "f.npz", x_adv=PGD(steps=20)(NET.eval(), X, Y, threat=Linf(0.1)).x_adv.numpy())
    records = run(plan_of(tmp_path / "f.npz"), workers=workers).records
    for record in records:
        assert solved(record, "starts") > 5


IMAGES = np.random.default_rng(0).random((N, 1, 8, 8), dtype=np.float32)
UNFIT = {
    "no images": ({"x": IMAGES}, ("it contains x, but no x_adv",)),
    "too few": ({"x_adv": IMAGES[:7]}, ("has 7 images", "has 359, and the run uses 40 of them", "an array index")),
    "other images": ({"x_adv": IMAGES[:, :, :5]}, ("each image is (1, 5, 8)", "are (1, 8, 8)")),
    "a lost axis": ({"x_adv": IMAGES[:, 0]}, ("each image is (8, 8)", "are (1, 8, 8)")),
    "bytes as floats": ({"x_adv": IMAGES * 255}, ("outside [0, 1]",)),
    "infinite": ({"x_adv": np.where(IMAGES > 0.99, np.inf, IMAGES)}, ("x_adv contains inf",)),
    "whole numbers": ({"x_adv": IMAGES.astype(np.int64)}, ("torch.int64",)),
    "pickles": ({"x_adv": np.array([{}] * N, dtype=object)}, ("cannot be read as plain arrays", "allow_pickle")),
    "an index beyond": (
        {"x_adv": IMAGES[:2], "index": np.array([0, 359])},
        ("index must give for each of the 2 rows its example", "in [0, 359)"),
    ),
    "an index that is short": (
        {"x_adv": IMAGES[:2], "index": np.array([0])},
        ("index must give for each of the 2 rows its example",),
    ),
    "other labels": ({"x_adv": IMAGES, "y": np.roll(Y.numpy(), 1)}, ("y differs from the labels", "another order")),
    "a success that is a number": ({"x_adv": IMAGES, "success": np.ones(N)}, ("success is float64",)),
    "nothing": ({"x_adv": IMAGES[:0]}, ("has 0 images",)),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_file_that_does_not_fit_is_refused_in_one_line(name, tmp_path, capsys):
    arrays, message = UNFIT[name]
    np.savez(tmp_path / "f.npz", **arrays)
    check_refused([str(tmp_path / "f.npz")], message, capsys, tmp_path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_missing_or_unreadable_file_is_refused_in_one_line(suffix, tmp_path, capsys):
    check_refused([f"{tmp_path}/none{suffix}"], ("there is no such file",), capsys, tmp_path)
    (tmp_path / f"text{suffix}").write_text("text")
    check_refused([f"{tmp_path}/text{suffix}"], ("cannot be read as plain arrays",), capsys, tmp_path)
    (tmp_path / "file.txt").write_text("text")
    check_refused(
        [f"{tmp_path}/file.txt"], ("has no readable plan.toml", "npz or safetensors file with x_adv"), capsys, tmp_path
    )


def check_refused(files, message, capsys, tmp_path):
    words = [*WORDS, "--attack", "fgsm", "--out", str(tmp_path / "out"), *(w for file in files for w in ("--start-from", file))]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("start-from=", *message):
        assert part in error
    assert not (tmp_path / "out").exists()


def test_only_the_rows_of_a_block_are_read(tmp_path):
    np.savez(tmp_path / "f.npz", x_adv=IMAGES)
    file = read_adversarial_file(str(tmp_path / "f.npz"), DIGITS, range(N))
    ranges = []
    inner = file.read

    def spy(first, last):
        ranges.append((first, last))
        return inner(first, last)

    object.__setattr__(file, "read", spy)
    assert torch.equal(file.images([3, 5]), torch.from_numpy(IMAGES[[3, 5]]))
    assert ranges == [(3, 6)]
    with pytest.raises(ArgumentError, match="has 40 images"):
        read_adversarial_file(str(tmp_path / "f.npz"), DIGITS, range(7))
