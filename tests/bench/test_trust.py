"""Numbers that must not depend on who does the work, files that change under a run, models that misbehave."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import FGSM, PGD, Linf, Target, cli, evaluate, zoo
from robustkit.bench import Case, Plan
from robustkit.bench.execution.executors import Processes
from robustkit.bench.execution.loaded_run import ResolvedCase, RunLoader, load
from robustkit.bench.execution.preview import preview
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.folder import open_folder
from robustkit.bench.plan.request import Request
from robustkit.bench.plan.specs import goal
from robustkit.bench.results import read_run as past
from robustkit.bench.results.block import Task
from robustkit.bench.results.store import Files, Memory
from robustkit.commands import bench as command
from robustkit.commands.bench import RunOptions, bench_command
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError, RobustkitError

NET = zoo.load("digits-mlp")
DATA = load_data("digits")
CASE = Case("zoo:digits-mlp", "linf:0.1", "pgd:steps=3")
WORDS = ["bench", "--data", "digits", "--limit", "40", "--block", "10", "--threat", "linf:0.1", "--attack", "pgd:steps=3"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


class Around(nn.Module):
    """A model around the small one; `do` sees the images first."""

    def __init__(self, do):
        super().__init__()
        self.net, self.do = zoo.load("digits-mlp"), do

    def forward(self, x):
        return self.net(self.do(x))


def timeless(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def alone(plan):
    (outcome,) = outcomes(load(plan))
    return outcome.record


# --- the name of a block -------------------------------------------------------------------------------------------------

PLAN = Plan((CASE,), "digits", limit=40)


def name_of(loaded):
    return loaded.tasks()[0].name


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 99},
        {"block": 99},
        {"device": "cuda"},
        {"normalize": "0.5,0.5"},
        {"offset": 1},
        {"save_adversarial": True},
        {"pins": {"digits": "0", "zoo:digits-mlp": "1"}},
    ],
)
def test_a_block_is_named_by_all_that_its_outcome_depends_on(change):
    loaded = load(PLAN)
    loaded.plan = replace(loaded.plan, pins={"digits": "1", "zoo:digits-mlp": "1"})
    before = name_of(loaded)
    assert name_of(loaded) == before
    loaded.plan = replace(loaded.plan, **change)
    assert name_of(loaded) != before


@pytest.mark.parametrize(
    "change",
    [
        {"attack": PGD(steps=4)},
        {"attack": FGSM()},
        {"threat": Linf(0.1, bounds=(0.0, 2.0))},
        {"case": replace(CASE, goal="classify-as:1")},
    ],
)
def test_a_block_is_named_by_the_recipe_and_not_by_words_alone(change):
    loaded = load(PLAN)
    before = name_of(loaded)
    trial = ResolvedCase(CASE, PGD(steps=3), Linf(0.1), goal("misclassify"))
    loaded.trials = (trial,)
    assert name_of(loaded) == before
    loaded.trials = (replace(trial, **change),)
    assert name_of(loaded) != before


@pytest.mark.parametrize("change", [{"environment": {"torch": "1.0"}}, {"fingerprints": {"zoo:digits-mlp": "0"}}])
def test_a_block_is_named_by_versions_and_hardware_and_by_what_the_model_says(change):
    loaded = load(PLAN)
    before = name_of(loaded)
    for name, value in change.items():
        setattr(loaded, name, getattr(loaded, name) | value)
    assert name_of(loaded) != before


def test_blocks_of_other_settings_are_not_taken_for_ours(tmp_path):
    store, found = Files(tmp_path), []
    for change in ({}, {"seed": 1}, {"batch_size": 7}, {"normalize": None}):
        loaded = load(replace(PLAN, **change))
        list(outcomes(loaded, store, progress=lambda block, there: found.append(there)))
    assert found == [False, False, False, True]


# --- threads and pictures ------------------------------------------------------------------------------------------------


def test_a_run_has_its_own_threads_and_leaves_those_of_the_caller(use):
    before, seen = torch.get_num_threads(), []

    def watched(x):
        seen.append(torch.get_num_threads())
        return x

    use(Around(watched))
    loaded = load(replace(PLAN, threads=before + 1))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    seen.clear()
    list(outcomes(loaded))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    assert loaded.environment["threads"] == before + 1


def test_pictures_are_those_of_the_first_block():
    (outcome,) = outcomes(load(replace(PLAN, block=10)))
    assert len(outcome.pictures) == 4
    assert max(picture.index for picture in outcome.pictures) < 10


def test_a_model_that_says_something_else_has_another_fingerprint(use):
    use(Around(lambda x: x))
    one = load(PLAN)
    use(Around(lambda x: x + 1e-5))
    other = load(PLAN)
    assert other.fingerprints != one.fingerprints
    assert name_of(other) != name_of(one)


def test_a_worker_with_another_model_than_that_of_its_parent_does_no_block(use):
    """Its answers must be the same to the last bit, as for a run that is resumed: blocks of both are counted together."""
    use(Around(lambda x: x))
    begun = load(PLAN)
    use(Around(lambda x: x + 1e-4))
    with pytest.raises(ArgumentError):
        pickle.loads(pickle.dumps(RunLoader(begun.plan, begun)))()


# --- models that change what they are given, or remember -----------------------------------------------------------------


def rounded(x):
    with torch.no_grad():
        x.gt_(0.5)
    return x


def rounded_aside(x):
    return x + (x.gt(0.5).float() - x).detach()


def test_a_model_that_works_in_place_does_not_change_the_images(use):
    use(Around(rounded_aside).eval())
    aside = alone(PLAN)
    use(Around(rounded).eval())
    inside = alone(PLAN)
    for name in ("clean_accuracy", "robust_accuracy", "success_rate", "data_hash"):
        assert inside[name] == aside[name]


def test_evaluate_leaves_the_images_of_the_caller_alone():
    x = DATA.x[:40].clone()
    evaluate(Around(rounded).eval(), (x, DATA.y[:40]), threat="linf:0.1", attacks=["fgsm"])
    assert torch.equal(x, DATA.x[:40])


class Dice(Around):
    """Noise from a generator of the model's own, which nobody seeds."""

    def __init__(self):
        super().__init__(lambda x: x + 0.3 * torch.randn(x.shape, generator=self.generator))
        self.generator = torch.Generator().manual_seed(0)


def test_noise_of_the_models_own_does_not_depend_on_what_was_done_before(use):
    """Resumed in a new process, the model is made anew, so its generator begins anew: either the same numbers, or a flag."""
    plan = replace(PLAN, block=10)
    use(Dice().eval())
    undisturbed = alone(plan)
    store = Memory()
    use(Dice().eval())
    first = load(plan)
    for task in first.tasks()[:2]:
        store.put(first.measure(task))
    use(Dice().eval())
    (resumed,) = outcomes(load(plan), store)
    assert timeless(resumed.record) == timeless(undisturbed) or resumed.record["flags"]


def test_a_model_of_the_same_decisions_and_other_gradients_is_another_model(use):
    """Else a run that was begun with one is resumed with the other, and its blocks are of both."""
    use(Around(lambda x: x))
    begun = load(PLAN)

    class Steep(Around):
        def forward(self, x):
            return 1000 * super().forward(x).double()

    use(Steep(lambda x: x))
    with pytest.raises(ArgumentError, match="has the hash"):
        load(begun.plan)


def test_targets_of_several_sizes_each_keep_to_their_own():
    most = {}

    def watched(name):
        def watch(x):
            most[name] = max(most.get(name, 0), len(x))
            return x

        return Around(watch).eval()

    targets = {"small": Target(watched("small"), batch_size=3), "large": Target(watched("large"), batch_size=20)}
    evaluate(targets, (DATA.x[:30], DATA.y[:30]), threat="linf:0.1", attacks=["fgsm"])
    assert most == {"small": 3, "large": 20}


def test_a_model_named_as_the_data_does_not_lend_them_its_hash():
    (plain,) = evaluate({"net": NET}, DATA, threat="linf:0.1", attacks=["fgsm"], limit=10).records
    (named,) = evaluate({"digits": NET}, DATA, threat="linf:0.1", attacks=["fgsm"], limit=10).records
    assert named["data_hash"] == plain["data_hash"]


# --- a dry run -----------------------------------------------------------------------------------------------------------


def test_a_slow_model_can_be_previewed(use):
    """So slow that a tenth of a second is less than a block: what a dry run is for."""

    def slow(x):
        time.sleep(0.005 * len(x))
        return x

    use(Around(slow))
    (row,) = preview(load(replace(PLAN, cases=(replace(CASE, attack="fgsm"),))))
    assert 4 <= row.tried < 40


# --- files that change under a run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_that_change_under_a_run_are_not_measured(tmp_path, save):
    file = tmp_path / "x.npz"
    save(file, x=DATA.x.numpy(), y=DATA.y.numpy())
    loaded = load(Plan((CASE,), f"npz:{file}", limit=200, block=20))
    save(file, x=np.ascontiguousarray(DATA.x.numpy()[::-1] * 0.5), y=DATA.y.numpy())
    with pytest.raises(RobustkitError, match=r"x\.npz"):
        list(outcomes(loaded))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"environment": 3}', '{"records": 3}', "\x93NUMPY"],
)
def test_a_damaged_results_file_is_told_when_a_run_is_resumed(tmp_path, content):
    loaded = load(PLAN)
    with open_folder(tmp_path / "run", loaded.plan) as folder:
        folder.begin(loaded)
    (tmp_path / "run" / "results.json").write_text(content, encoding="latin-1")
    with open_folder(tmp_path / "run", loaded.plan, resume=True) as folder, pytest.raises(ArgumentError, match="results"):
        folder.begin(loaded)


def test_a_block_in_the_place_of_another_is_as_good_as_none(tmp_path):
    loaded, store = load(replace(PLAN, block=10)), Files(tmp_path)
    first, second, *_ = loaded.tasks()
    store.put(loaded.measure(first))
    store.path(first).rename(store.path(second))
    assert store.get(second) is None


def test_a_block_with_other_bits_is_as_good_as_none(tmp_path):
    loaded, store = load(PLAN), Files(tmp_path)
    (task,) = loaded.tasks()
    store.put(loaded.measure(task))
    path = store.path(task)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:start])["robust"]["data_offsets"]
    content[start + begin : start + end] = b"\1" * (end - begin)
    path.write_bytes(content)
    assert store.get(task) is None


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    def full(self, content):
        raise OSError(28, "No space left on device")

    real = type(tmp_path).write_bytes
    monkeypatch.setattr(
        type(tmp_path),
        "write_bytes",
        lambda path, content: full(path, content) if "safetensors" in path.name else real(path, content),
    )
    assert cli.main([*WORDS, "--model", "zoo:digits-mlp", "--out", str(tmp_path / "run")]) == 2
    assert "No space left" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------------------------------


def test_resuming_without_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*WORDS, "--model", "zoo:digits-mlp", "--resume"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_plan_is_not_resumed_with_another_plan(tmp_path, monkeypatch):
    """Killed before the plan was written: `--out DIR --resume` alone does not say what to run, and is not the default run."""
    from robustkit.commands import bench as command

    asked = []
    monkeypatch.setattr(command, "load", lambda plan: asked.append(plan) or pytest.fail("another plan was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    assert cli.main(["bench", "--out", str(tmp_path / "run"), "--resume"]) == 2


def test_a_file_of_someone_else_is_not_overwritten_by_resuming(tmp_path):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    assert cli.main([*WORDS, "--model", "zoo:digits-mlp", "--out", str(tmp_path), "--resume"]) == 2
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


FACTORY = """
import sys
from torch import nn
from robustkit import zoo

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = zoo.load("digits-mlp"), 0

    def forward(self, x):
        self.calls += 1
        {}
        return self.net(x)
"""


def made_of(tmp_path, line):
    (tmp_path / "net.py").write_text(FACTORY.format(line))
    return f"{tmp_path / 'net.py'}:Net"


def test_a_model_that_prints_does_not_spoil_the_json(tmp_path, capsys):
    words = [*WORDS, "--model", made_of(tmp_path, "print('hello')"), "--out", str(tmp_path / "run"), "--format", "json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["records"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_ends_the_program_passes_no_gate(tmp_path, workers):
    model = made_of(tmp_path, "self.calls > 3 and sys.exit(0)")
    words = [*WORDS, "--model", model, "--out", str(tmp_path / "run"), "--fail-under", "0.99", "--workers", workers]
    ended = subprocess.run([sys.executable, "-m", "robustkit", *words], env=ENV, capture_output=True, timeout=100)
    assert ended.returncode != 0


# --- workers -------------------------------------------------------------------------------------------------------------


def ends_at_once(log):
    with open(log, "a") as file:
        file.write("tried\n")
    os._exit(1)


class Stillborn:
    """Work that ends every worker before it has begun, as a script does that has no `if __name__ == "__main__":`."""

    def __init__(self, log):
        self.log = log

    def __call__(self):
        raise AssertionError("not reached")

    def __reduce__(self):
        return ends_at_once, (self.log,)


def test_workers_that_never_start_are_told_soon_and_not_taken_for_a_lack_of_memory(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RobustkitError, match="start"):
        list(Processes(2, patience=1).run(Stillborn(str(log)), range(2)))
    assert log.read_text().count("tried") <= 4


def test_a_preview_of_a_fast_model_is_of_a_whole_block():
    (row,) = preview(load(PLAN))
    block = load(PLAN).measure(Task(0, 0, 40, "x"))
    assert (row.images, row.tried) == (40, 40)
    assert (row.forwards, row.backwards) == (int(block.result.forwards.sum()), int(block.result.backwards.sum()))


# --- what no other test would notice -------------------------------------------------------------------------------------

TWO = replace(PLAN, cases=(CASE, replace(CASE, attack="fgsm")), block=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two cases of four blocks."""
    path, loaded = tmp_path_factory.mktemp("finished") / "run", load(TWO)
    with open_folder(path, loaded.plan) as folder:
        folder.begin(loaded)
        folder.write(loaded, list(outcomes(loaded, folder.store)))
    return path


@pytest.mark.parametrize("left", [("results.json", ".lock"), (".lock", ".plan.toml.part"), (".lock", ".results.json.part"), ()])
def test_a_run_that_was_killed_before_it_had_said_what_it_is_begins_anew(finished, tmp_path, left):
    out = tmp_path / "run"
    out.mkdir()
    for name in left:
        begun = json.loads((finished / "results.json").read_text()) | {"records": []}
        (out / name).write_text(json.dumps(begun) if name == "results.json" else "half")
    with open_folder(out, load(TWO).plan, resume=True) as folder:
        assert folder.fresh


def test_the_plan_is_written_last_for_it_says_that_a_run_was_begun(tmp_path, monkeypatch):
    """Killed between the two, the folder can still be taken: a plan without results would be refused."""
    order, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: order.append(target.name) or real(source, target))
    with open_folder(tmp_path / "run", load(PLAN).plan) as folder:
        folder.begin(load(PLAN))
    assert order == ["results.json", "plan.toml"]


def test_pictures_stand_in_the_order_of_the_plan(tmp_path):
    loaded = load(TWO)
    done = list(outcomes(loaded))
    pages = []
    for number, order in enumerate((done, done[::-1])):
        with open_folder(tmp_path / str(number), loaded.plan) as folder:
            folder.begin(loaded)
            folder.write(loaded, order)
            pages.append((folder.path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{"])
def test_results_that_are_none_are_not_read(finished, tmp_path, content):
    run = copied(finished, tmp_path)
    (run / "results.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"holds no readable results\.json"):
        past.read(run)


@pytest.mark.parametrize("content", ['{"records": 3}', '{"records": [{}]}'])
def test_results_with_strange_records_are_not_read(finished, tmp_path, content):
    run = copied(finished, tmp_path)
    (run / "results.json").write_text(content)
    with pytest.raises(ArgumentError):
        past.read(run)


SMALL = Request(
    model=["zoo:digits-mlp"], data="digits", limit=40, threat=["linf:0.1"], attack=["pgd:steps=3", "fgsm"], block=10
)


def test_resuming_with_other_words_is_refused_and_not_silently_the_old_plan(finished, tmp_path):
    run = copied(finished, tmp_path)
    with pytest.raises(ArgumentError, match=r"another plan \(other limit"):
        bench_command(replace(SMALL, limit=30), RunOptions(run, resume=True))


def reversed_outcomes(*arguments):
    return reversed(list(outcomes(*arguments)))


def test_cases_that_are_finished_in_another_order_are_judged_as_those_that_they_are(finished, tmp_path, monkeypatch, capsys):
    """As workers may finish them: what survives each must stay with its record."""
    monkeypatch.setattr(command, "outcomes", reversed_outcomes)
    request = replace(SMALL, threat=["linf:0.1", "linf:0.02"], attack=["fgsm"])
    assert bench_command(request, RunOptions(tmp_path / "a", baseline=None)) == 0
    assert bench_command(request, RunOptions(tmp_path / "b", baseline=tmp_path / "a", fail_if_worse=0.0)) == 0
    assert "0 of 40 images lost, 0 won" in capsys.readouterr().out


def test_a_preview_extrapolates_from_what_it_tried():
    loaded = load(replace(PLAN, limit=200, block=20))
    (row,) = preview(loaded)
    block = loaded.measure(Task(0, 0, 20, "x"))
    assert (row.images, row.tried) == (200, 20)
    assert row.forwards == 10 * int(block.result.forwards.sum())
    assert row.backwards == 10 * int(block.result.backwards.sum())
    assert row.seconds > 3 * block.seconds  # ten times as long; half of that for a machine that is busy


@dataclass(frozen=True)
class Noted:
    """Leaves a line for every task that it did."""

    log: str

    def __call__(self):
        return self.do

    def do(self, task):
        with open(self.log, "a") as file:
            file.write(f"{task}\n")
        return task


def test_workers_do_not_run_ahead_of_who_takes_their_results(tmp_path):
    """Else the results of a run whose disk is slow would fill the memory."""
    log = tmp_path / "log"
    running = Processes(1).run(Noted(str(log)), range(100))
    next(running)
    time.sleep(1)
    assert len(log.read_text().splitlines()) <= 3
    assert len(list(running)) == 99


class Deadly(Noted):
    """Leaves a line, and then kills its worker."""

    def do(self, task):
        super().do(task)
        os.kill(os.getpid(), signal.SIGKILL)


def test_work_that_kills_is_tried_in_company_once_and_alone_as_often_as_patience_says(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RobustkitError, match="killed its worker 2 times"):
        list(Processes(1, patience=2).run(Deadly(str(log)), [7]))
    assert log.read_text().split() == ["7"] * 3
