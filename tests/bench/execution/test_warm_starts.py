"""Warm starts: a larger eps starts from the successes of a smaller one, and a run from those of earlier runs."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from robustkit import cli, evaluate, zoo
from robustkit.bench import Case, Plan, read_plan
from robustkit.bench.execution import loaded_run as loaded_module
from robustkit.bench.execution.executors import Processes
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.execution.warm_starts import read_warm_starts
from robustkit.bench.results.block import Block
from robustkit.bench.results.store import Files, Memory
from robustkit.bench.run_folder import open_folder
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError

EPS = ("pixels:2", "pixels:3", "pixels:5")
WEAK = "onepixel:population=10,generations=1"  # so weak that more pixels may solve fewer images
MODEL = "zoo:digits-mlp"


def plan_of(*threats, attack=None, model=MODEL, **options):
    attack = attack or (WEAK if threats[0].startswith("pixels") else "fgsm")
    options = {"limit": 60, "block": 25} | options
    return Plan(tuple(Case(model, threat, attack) for threat in threats), "digits", **options)


def masks(plan, **options):
    """The robust images, by threat."""
    return {plan.cases[one.index].threat: one.robust for one in outcomes(load(plan), **options)}


def without_seconds(block):
    """A block without its seconds, as bytes."""
    return replace(block, seconds=0.0).to_bytes()


def stored(loaded, store):
    return {task.name: without_seconds(store.get(task)) for task in loaded.tasks()}


def run(out, plan):
    """Run a plan as the command line does."""
    loaded = load(plan)
    with open_folder(out, loaded.plan) as folder:
        folder.begin(loaded)
        done = list(outcomes(loaded, folder.store))
        folder.write(loaded, done)
    return {loaded.plan.cases[one.index].threat: one.robust for one in done}


def blocks(out):
    return [Block.load(file) for file in sorted((out / "examples").rglob("*.safetensors"))]


# --- a sweep over eps ------------------------------------------------------------------------------------------------------

ALONE = {threat: masks(plan_of(threat))[threat] for threat in EPS}


def test_robust_accuracy_never_rises_with_eps_and_otherwise_equals_that_of_separate_runs():
    """Without starts, some images that are solved under a smaller eps are not under a larger one."""
    assert any((after & ~before).any() for before, after in pairwise(ALONE.values()))
    swept, so_far = masks(plan_of(*EPS[::-1])), np.ones(60, np.bool_)
    for threat in EPS:
        so_far &= ALONE[threat]
        assert swept[threat].tolist() == so_far.tolist(), threat


def test_a_start_that_succeeds_costs_three_forward_passes_and_is_a_stage_of_the_record():
    store = Memory()
    done = {outcome.record["threat"]: outcome for outcome in outcomes(load(plan_of(*EPS)), store)}
    for below, threat in pairwise(EPS):
        stages = {stage["name"]: stage for stage in done[threat].record["stages"]}
        solved_below = 60 - stages["clean"]["solved"] - done[below].robust.sum()
        assert stages["starts"]["solved"] == stages["starts"]["forwards"] == solved_below > 0
    assert "starts" not in [stage["name"] for stage in done[EPS[0]].record["stages"]]
    for task, block in store.blocks.items():
        names = [stage.name for stage in block.result.stages]
        assert ("starts" in names) == (task.case > 0)
        if "starts" in names:
            by_start = block.result.solver == names.index("starts")
            assert by_start.any()
            assert (block.result.forwards[by_start] == 3).all()


def test_an_example_that_needed_no_perturbation_starts_from_itself():
    """Goals other than misclassification also attack examples at which they hold already: these start from x itself."""
    case = Case(MODEL, "linf:0.05", "fgsm", "classify-as:3")
    loaded = load(Plan((case, replace(case, threat="linf:0.1")), "digits", limit=60, block=60))
    low, high = loaded.measure_chain(loaded.tasks())
    unperturbed = low.result.success & (low.result.size == 0)
    assert unperturbed.sum() > 3
    assert len(low.adversarial) == int((low.result.success & ~unperturbed).sum())
    number = [stage.name for stage in high.result.stages].index("starts")
    assert (high.result.solver[unperturbed] == number).all()
    assert (high.result.size[unperturbed] == 0).all()
    assert (high.result.forwards[low.result.success] == 2).all()


def test_evaluate_uses_the_same_starts():
    data = load_data("digits").part(0, 60)
    report = evaluate({"m": zoo.load("digits-mlp")}, data, threat=list(EPS), attacks=WEAK)
    swept = masks(plan_of(*EPS))
    assert [record["robust_accuracy"] for record in report.records] == [swept[threat].mean() for threat in EPS]


class Backwards:
    """Runs the chains in reverse order."""

    def run(self, make, tasks):
        do = make()
        return (do(task) for task in reversed(tasks))


class Singly:
    """Splits chains into single blocks, and runs them from the largest eps down."""

    def run(self, make, tasks):
        do = make()
        return (do((task,)) for chain in tasks for task in reversed(chain))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    loaded, store = load(plan_of(*EPS)), Files(tmp_path_factory.mktemp("whole"))
    list(outcomes(loaded, store))
    return store.root, stored(loaded, store)


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Backwards(), Singly(), Processes(2)], ids=lambda one: type(one).__name__)
def test_blocks_are_equal_bit_for_bit_with_any_executor_and_order(tmp_path, whole, executor):
    loaded, store = load(plan_of(*EPS)), Files(tmp_path)
    list(outcomes(loaded, store, executor))
    assert stored(loaded, store) == whole[1]


@pytest.mark.parametrize("finished", range(8))
def test_blocks_are_equal_whichever_of_a_chain_were_stored(tmp_path, whole, finished):
    """Every subset of the three blocks of some images, also blocks without those that they start from."""
    loaded, store = load(plan_of(*EPS)), Files(tmp_path)
    for task in loaded.tasks():
        if task.first == 25 and finished >> task.case & 1:
            store.path(task).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Files(whole[0]).path(task), store.path(task))
    stored_before = []
    list(outcomes(loaded, store, progress=lambda block, was_stored: stored_before.append(was_stored)))
    assert sum(stored_before) == finished.bit_count()
    assert stored(loaded, store) == whole[1]


def test_a_block_that_starts_from_a_damaged_one_is_equal(tmp_path, whole):
    loaded = load(plan_of(*EPS))
    shutil.copytree(whole[0], tmp_path / "copy")
    store = Files(tmp_path / "copy")
    low, _, high = (task for task in sorted(loaded.tasks(), key=lambda task: task.case) if task.first == 0)
    store.path(low).write_bytes(b"x")
    store.path(high).unlink()
    list(outcomes(loaded, store))
    assert stored(loaded, store) == whole[1]


def test_a_block_without_images_is_computed_again_for_those_that_start_from_it(tmp_path, whole):
    """As in a run that is too large to store its images."""
    loaded, store = load(plan_of(*EPS)), Files(tmp_path)
    for task in loaded.tasks():
        if task.case < 2:
            store.put(replace(Files(whole[0]).get(task), kept_images=None))
    list(outcomes(loaded, store))
    largest = {task.name: without_seconds(store.get(task)) for task in loaded.tasks() if task.case == 2}
    assert largest.items() <= whole[1].items()


def test_images_beyond_the_size_limit_are_not_stored_and_nothing_else_changes(tmp_path, whole, monkeypatch):
    plan, store = plan_of(*EPS), Files(tmp_path)
    monkeypatch.setattr(loaded_module, "MAX_STORED_BYTES", 60 * 64 * 4 - 1)
    list(outcomes(load(plan), store))
    for task in load(plan).tasks():
        block, usual = store.get(task), Files(whole[0]).get(task)
        assert block.kept_images is None
        assert without_seconds(replace(block, kept_images=usual.kept_images)) == whole[1][task.name]
    monkeypatch.setattr(loaded_module, "MAX_STORED_BYTES", 60 * 64 * 4)
    list(outcomes(load(plan), fits := Files(tmp_path / "fits")))
    assert stored(load(plan), fits) == whole[1]


def names(plan, threat):
    loaded = load(plan)
    return {task.name for task in loaded.tasks() if loaded.plan.cases[task.case].threat == threat}


def test_the_name_of_a_block_depends_only_on_the_block_that_it_starts_from():
    top = names(plan_of(*EPS), EPS[2])
    assert names(plan_of(*EPS[::-1]), EPS[2]) == top  # the order of the plan does not matter
    assert names(plan_of(*EPS, "pixels:7"), EPS[2]) == top
    for others in (EPS[1:], EPS[::2], ("pixels:1", *EPS), ("pixels:4", *EPS)):
        assert names(plan_of(*others), EPS[2]) != top
    assert names(plan_of(EPS[0]), EPS[0]) == names(plan_of(*EPS), EPS[0])


def test_cases_with_another_attack_goal_model_or_type_of_threat_do_not_start_from_each_other():
    case = Case(MODEL, "linf:0.3", "fgsm")
    lone = names(Plan((case,), "digits", limit=60, block=25), "linf:0.3")
    others = [
        Case(MODEL, "linf:0.1", "pgd"),
        Case(MODEL, "linf:0.1", "fgsm", "least-likely"),
        Case(MODEL, "l2:0.1", "fgsm"),
        Case("torch.nn:Flatten", "linf:0.1", "fgsm"),
    ]
    for other in others:
        assert names(Plan((case, other), "digits", limit=60, block=25), "linf:0.3") == lone
    assert names(Plan((case, replace(case, threat="linf:0.1")), "digits", limit=60, block=25), "linf:0.3") != lone
    sweep = plan_of("linf:0.1", "linf:0.3", attack="uap-pgd:epochs=1")
    assert names(sweep, "linf:0.3") == names(plan_of("linf:0.3", attack="uap-pgd:epochs=1"), "linf:0.3")


# --- earlier runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """A run of a stronger attack on some of the images."""
    out = tmp_path_factory.mktemp("strong") / "run"
    return out, run(out, plan_of("linf:0.1", attack="pgd:steps=20", limit=50))


def test_successes_of_an_earlier_run_are_kept_and_other_images_are_unchanged(strong):
    """Images are matched by their index, with another offset and other blocks than in the earlier run."""
    out, before = strong
    plan = plan_of("linf:0.1", offset=20, limit=60, block=32)
    (without,), (robust,) = (masks(one).values() for one in (plan, replace(plan, start_from=(str(out),))))
    expected = without.copy()
    expected[:30] &= before["linf:0.1"][20:]
    assert robust.tolist() == expected.tolist()
    assert expected.sum() < without.sum()


def test_of_several_images_the_one_with_the_smallest_perturbation_is_used(tmp_path):
    """Bit for bit, recomputed from the files; images outside a smaller threat are projected."""
    for name, eps in (("a", "linf:0.3"), ("b", "linf:0.15")):
        run(tmp_path / name, plan_of(eps, attack="pgd:steps=3,reach=0.9"))
    known = {}
    for name in "ab":
        for block in blocks(tmp_path / name):
            for index, size, image in zip(
                block.ids[block.perturbed].tolist(), block.result.size[block.perturbed], block.adversarial, strict=True
            ):
                known[index] = min(known.get(index, (9.0, None)), (float(size), image), key=lambda pair: pair[0])
    starts = (str(tmp_path / "a"), str(tmp_path / "b"))
    loaded = load(plan_of("linf:0.3", start_from=starts))
    taken = 0
    for task in loaded.tasks():
        block = loaded.measure(task)
        by_start = block.result.solver[block.perturbed] == [stage.name for stage in block.result.stages].index("starts")
        for index, image, started in zip(block.ids[block.perturbed].tolist(), block.adversarial, by_start, strict=True):
            assert bool(started) == (index in known)
            if started:
                assert torch.equal(image, known[index][1])
                taken += 1
    assert taken == len(known) > 20
    small = load(plan_of("linf:0.05", start_from=starts))
    assert sum(int((block.result.size > 0.05 + 1e-6).sum()) for block in map(small.measure, small.tasks())) == 0


def test_images_of_the_same_model_come_before_those_of_others(tmp_path, monkeypatch):
    """A copy with other weights was attacked under a smaller eps, so its perturbations are smaller."""
    monkeypatch.chdir(tmp_path)
    weights = {name: tensor + 0.001 for name, tensor in zoo.load("digits-mlp").state_dict().items()}
    save_file(weights, "weak.safetensors")
    own, other = plan_of("linf:0.3", attack="pgd:steps=20"), f"{MODEL}@weights=weak.safetensors"
    before = run(tmp_path / "own", own)["linf:0.3"]
    run(tmp_path / "other", plan_of("linf:0.1", attack="pgd:steps=20", model=other))
    data = load_data("digits")
    warm_starts = read_warm_starts((str(tmp_path / "other"), str(tmp_path / "own")), data)
    (goal, threat), signature = ("misclassify", load(own).cases[0].threat), load(own).plan.expected_hashes[MODEL]
    ids = torch.arange(60)
    starts = warm_starts.starting_points(goal, threat, signature, ids, data.images(slice(0, 60)))
    own_ids = torch.cat([block.ids[block.perturbed] for block in blocks(tmp_path / "own")])
    assert torch.equal(starts[own_ids], torch.cat([block.adversarial for block in blocks(tmp_path / "own")]))
    both = masks(plan_of("linf:0.3", start_from=(str(tmp_path / "other"), str(tmp_path / "own"))))["linf:0.3"]
    assert not (both & ~before).any()


def test_images_of_other_goals_and_types_of_threats_are_not_used(tmp_path):
    plan = Plan((Case(MODEL, "linf:0.3", "pgd:steps=10", "least-likely"), Case(MODEL, "l2:2", "fgsm")), "digits", limit=30)
    run(tmp_path / "a", plan)
    assert all(block.perturbed.any() for block in blocks(tmp_path / "a"))
    (block,) = (lambda loaded: [loaded.measure(task) for task in loaded.tasks()])(
        load(plan_of("linf:0.1", limit=30, block=30, start_from=(str(tmp_path / "a"),)))
    )
    assert "starts" not in [stage.name for stage in block.result.stages]


def test_the_name_of_a_block_depends_on_the_content_of_the_earlier_run_and_not_on_its_path(strong, tmp_path):
    shutil.copytree(strong[0], tmp_path / "copy")
    without, original, copied = (
        names(plan_of("linf:0.1", start_from=runs), "linf:0.1") for runs in ((), (str(strong[0]),), (str(tmp_path / "copy"),))
    )
    assert original == copied
    assert not without & original
    next((tmp_path / "copy" / "examples").rglob("*.safetensors")).unlink()
    assert not names(plan_of("linf:0.1", start_from=(str(tmp_path / "copy"),)), "linf:0.1") & original


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_plan_records_the_earlier_run_and_refuses_to_resume_if_it_changes(strong, tmp_path, workers, capsys):
    out, start = tmp_path / "out", tmp_path / "start"
    shutil.copytree(strong[0], start)
    words = [
        "bench",
        "--model",
        MODEL,
        "--data",
        "digits",
        "--limit",
        "40",
        "--block",
        "15",
        "--threat",
        "linf:0.1",
        "--attack",
        "fgsm",
        "--start-from",
        str(start),
        "--out",
        str(out),
    ]
    assert cli.main([*words, "--workers", workers]) == 0
    plan = read_plan(out / "plan.toml")
    assert plan.start_from == (str(start),)
    assert (
        plan.expected_hashes[f"start-from:{start}"]
        == read_warm_starts(plan.start_from, load_data("digits")).hashes[f"start-from:{start}"]
    )
    results = json.loads((out / "results.json").read_text())
    assert f"--start-from {start}" in results["command"]
    expected = masks(plan_of("linf:0.1", limit=40, block=15, start_from=(str(start),)))["linf:0.1"]
    assert results["records"][0]["robust_accuracy"] == expected.mean()
    for block in sorted((out / "examples").rglob("*.safetensors"))[1:]:
        block.unlink()
    assert cli.main(["bench", "--out", str(out), "--resume"]) == 0
    again = json.loads((out / "results.json").read_text())
    for content in (results, again):
        content["records"][0].pop("seconds")
    assert again == results
    next((start / "examples").rglob("*.safetensors")).unlink()
    capsys.readouterr()
    assert cli.main(["bench", "--out", str(out), "--resume"]) == 2
    assert "has the hash" in capsys.readouterr().err


def remove_images(out):
    """Remove the images from a run, as if an older version had written it."""
    for file in (out / "examples").rglob("*.safetensors"):
        file.write_bytes(replace(Block.load(file), kept_images=None).to_bytes())


def test_a_folder_without_a_usable_run_is_refused_in_one_line(strong, tmp_path):
    shutil.copytree(strong[0], tmp_path / "old")
    remove_images(tmp_path / "old")
    shutil.copytree(strong[0], tmp_path / "begun")
    shutil.rmtree(tmp_path / "begun" / "examples")
    run(tmp_path / "train", replace(plan_of("linf:0.1", limit=20), data="digits:train"))
    run(tmp_path / "long", plan_of("linf:0.1", limit=20, offset=300))
    (tmp_path / "empty").mkdir()
    x, y = load_data("digits").x[:100].numpy(), load_data("digits").y[:100].numpy()
    np.savez(tmp_path / "few.npz", x=x, y=y)
    few = f"npz:{tmp_path / 'few.npz'}"
    for name, data, message in (
        ("old", "digits", "has no adversarial images: .* run it again, or leave it out"),
        ("begun", "digits", "has no adversarial images: no block is finished"),
        ("train", "digits", r"other images \(data='digits:train', offset=0\); name a run on images of data='digits'"),
        ("long", few, "other images .*name a run on images of data='npz:"),
        ("empty", "digits", "has no readable plan.toml; name a folder written by robustkit bench"),
        ("nowhere", "digits", "has no readable plan.toml"),
    ):
        with pytest.raises(
            ArgumentError, match=f"start-from='.*{name}' {message}" if name not in ("train", "long") else message
        ) as caught:
            load(replace(plan_of("linf:0.1"), data=data, start_from=(str(tmp_path / name),)))
        assert "\n" not in str(caught.value)
    # The same images under another name are the same images.
    assert load(replace(plan_of("linf:0.1"), data=few, start_from=(str(strong[0]),)))


def test_a_run_without_successes_is_accepted(tmp_path):
    run(tmp_path / "a", plan_of("linf:1e-6", limit=20))
    assert sum(int(block.perturbed.sum()) for block in blocks(tmp_path / "a")) == 0
    plan = plan_of("linf:0.1", limit=20)
    assert masks(replace(plan, start_from=(str(tmp_path / "a"),)))["linf:0.1"].tolist() == masks(plan)["linf:0.1"].tolist()


def test_a_damaged_block_is_refused(strong, tmp_path):
    shutil.copytree(strong[0], tmp_path / "a")
    file = next((tmp_path / "a" / "examples").rglob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArgumentError, match="is not a block of a run"):
        load(plan_of("linf:0.1", start_from=(str(tmp_path / "a"),)))
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # another image: found when it is read
    loaded = load(plan_of("linf:0.1", start_from=(str(tmp_path / "a"),)))
    with pytest.raises(ArgumentError, match="not those that were written"):
        list(map(loaded.measure, loaded.tasks()))
