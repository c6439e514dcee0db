"""Numbers that must not depend on the process that computes them, files that change during a run, models that misbehave."""

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
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.preview import preview
from robustkit.bench.execution.resolved_case import ResolvedCase
from robustkit.bench.execution.run_loader import RunLoader
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.plan.request import Request
from robustkit.bench.plan.specs import goal
from robustkit.bench.results.block import Task
from robustkit.bench.results.read_run import read
from robustkit.bench.results.store import Files, Memory
from robustkit.bench.run_folder import open_folder
from robustkit.commands import bench as command
from robustkit.commands.bench import RunOptions, bench_command
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError, RobustkitError

NET = zoo.load("digits-mlp")
DATA = load_data("digits")
CASE = Case("zoo:digits-mlp", "linf:0.1", "pgd:steps=3")
WORDS = ["bench", "--data", "digits", "--limit", "40", "--block", "10", "--threat", "linf:0.1", "--attack", "pgd:steps=3"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


class Preprocessed(nn.Module):
    """The small model behind a function of the images."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = zoo.load("digits-mlp"), function

    def forward(self, x):
        return self.net(self.function(x))


def without_seconds(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def record_of(plan):
    (outcome,) = outcomes(load(plan))
    return outcome.record


# --- the name of a block -------------------------------------------------------------------------------------------------

PLAN = Plan((CASE,), "digits", limit=40)


def first_name(schedule):
    return schedule.tasks()[0].name


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
        {"expected_hashes": {"digits": "0", "zoo:digits-mlp": "1"}},
    ],
)
def test_the_name_of_a_block_depends_on_every_setting_of_its_outcome(change):
    plan = replace(load(PLAN).plan, expected_hashes={"digits": "1", "zoo:digits-mlp": "1"})
    schedule = replace(load(PLAN).schedule, plan=plan)
    before = first_name(schedule)
    assert first_name(replace(schedule, plan=replace(plan))) == before
    assert first_name(replace(schedule, plan=replace(plan, **change))) != before


@pytest.mark.parametrize(
    "change",
    [
        {"attack": PGD(steps=4)},
        {"attack": FGSM()},
        {"threat": Linf(0.1, bounds=(0.0, 2.0))},
        {"case": replace(CASE, goal="classify-as:1")},
    ],
)
def test_the_name_of_a_block_depends_on_the_recipe_and_not_only_on_the_specs(change):
    schedule = load(PLAN).schedule
    before = first_name(schedule)
    resolved = ResolvedCase(CASE, PGD(steps=3), Linf(0.1), goal("misclassify"))
    assert first_name(replace(schedule, cases=(resolved,))) == before
    assert first_name(replace(schedule, cases=(replace(resolved, **change),))) != before


@pytest.mark.parametrize("change", [{"environment": {"torch": "1.0"}}, {"fingerprints": {"zoo:digits-mlp": "0"}}])
def test_the_name_of_a_block_depends_on_versions_and_hardware_and_on_the_outputs_of_the_model(change):
    schedule = load(PLAN).schedule
    changed = {name: getattr(schedule, name) | value for name, value in change.items()}
    assert first_name(replace(schedule, **changed)) != first_name(schedule)


def test_blocks_of_other_settings_are_not_reused(tmp_path):
    store, were_stored = Files(tmp_path), []
    for change in ({}, {"seed": 1}, {"batch_size": 7}, {"normalize": None}):
        loaded = load(replace(PLAN, **change))
        list(outcomes(loaded, store, progress=lambda block, was_stored: were_stored.append(was_stored)))
    assert were_stored == [False, False, False, True]


# --- threads and pictures ------------------------------------------------------------------------------------------------


def test_a_run_has_its_own_threads_and_restores_those_of_the_caller(use):
    before, counts = torch.get_num_threads(), []

    def watched(x):
        counts.append(torch.get_num_threads())
        return x

    use(Preprocessed(watched))
    loaded = load(replace(PLAN, threads=before + 1))
    assert set(counts) == {before + 1}
    assert torch.get_num_threads() == before
    counts.clear()
    list(outcomes(loaded))
    assert set(counts) == {before + 1}
    assert torch.get_num_threads() == before
    assert loaded.environment["threads"] == before + 1


def test_pictures_come_from_the_first_block():
    (outcome,) = outcomes(load(replace(PLAN, block=10)))
    assert len(outcome.pictures) == 4
    assert max(picture.index for picture in outcome.pictures) < 10


def test_a_model_with_other_outputs_has_another_fingerprint(use):
    use(Preprocessed(lambda x: x))
    one = load(PLAN)
    use(Preprocessed(lambda x: x + 1e-5))
    other = load(PLAN)
    assert other.fingerprints != one.fingerprints
    assert first_name(other.schedule) != first_name(one.schedule)


def test_a_worker_refuses_a_model_with_other_outputs_than_in_its_parent(use):
    """Outputs must agree to the last bit, as for a resumed run, because blocks of both processes are joined."""
    use(Preprocessed(lambda x: x))
    first = load(PLAN)
    use(Preprocessed(lambda x: x + 1e-4))
    with pytest.raises(ArgumentError):
        pickle.loads(pickle.dumps(RunLoader(first.plan, first)))()


# --- models that change their input, or have state ----------------------------------------------------------------------


def round_in_place(x):
    with torch.no_grad():
        x.gt_(0.5)
    return x


def round_copy(x):
    return x + (x.gt(0.5).float() - x).detach()


def test_a_model_that_works_in_place_does_not_change_the_images(use):
    use(Preprocessed(round_copy).eval())
    copied = record_of(PLAN)
    use(Preprocessed(round_in_place).eval())
    in_place = record_of(PLAN)
    for name in ("clean_accuracy", "robust_accuracy", "success_rate", "data_hash"):
        assert in_place[name] == copied[name]


def test_evaluate_does_not_change_the_images_of_the_caller():
    x = DATA.x[:40].clone()
    evaluate(Preprocessed(round_in_place).eval(), (x, DATA.y[:40]), threat="linf:0.1", attacks=["fgsm"])
    assert torch.equal(x, DATA.x[:40])


class OwnGenerator(Preprocessed):
    """A model with noise from a generator of its own."""

    def __init__(self):
        super().__init__(lambda x: x + 0.3 * torch.randn(x.shape, generator=self.generator))
        self.generator = torch.Generator().manual_seed(0)


def test_noise_from_a_generator_of_the_model_does_not_depend_on_earlier_blocks(use):
    """A resumed run makes the model again, with a new generator: its numbers must be the same, or flagged."""
    plan = replace(PLAN, block=10)
    use(OwnGenerator().eval())
    undisturbed = record_of(plan)
    store = Memory()
    use(OwnGenerator().eval())
    first = load(plan)
    for task in first.tasks()[:2]:
        store.put(first.measure(task))
    use(OwnGenerator().eval())
    (resumed,) = outcomes(load(plan), store)
    assert without_seconds(resumed.record) == without_seconds(undisturbed) or resumed.record["flags"]


def test_a_model_with_the_same_predictions_and_other_logits_is_another_model(use):
    """Otherwise a run that began with one could be resumed with the other."""
    use(Preprocessed(lambda x: x))
    first = load(PLAN)

    class ScaledLogits(Preprocessed):
        def forward(self, x):
            return 1000 * super().forward(x).double()

    use(ScaledLogits(lambda x: x))
    with pytest.raises(ArgumentError, match="has the hash"):
        load(first.plan)


def test_each_target_keeps_its_own_batch_size():
    largest = {}

    def watched(name):
        def watch(x):
            largest[name] = max(largest.get(name, 0), len(x))
            return x

        return Preprocessed(watch).eval()

    targets = {"small": Target(watched("small"), batch_size=3), "large": Target(watched("large"), batch_size=20)}
    evaluate(targets, (DATA.x[:30], DATA.y[:30]), threat="linf:0.1", attacks=["fgsm"])
    assert largest == {"small": 3, "large": 20}


def test_a_model_with_the_name_of_the_data_does_not_change_their_hash():
    (plain,) = evaluate({"net": NET}, DATA, threat="linf:0.1", attacks=["fgsm"], limit=10).records
    (named,) = evaluate({"digits": NET}, DATA, threat="linf:0.1", attacks=["fgsm"], limit=10).records
    assert named["data_hash"] == plain["data_hash"]


# --- a dry run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_slow_model_can_be_previewed(use):
    """It classifies less than a block in a tenth of a second."""

    def slow(x):
        time.sleep(0.005 * len(x))
        return x

    use(Preprocessed(slow))
    (row,) = preview(load(replace(PLAN, cases=(replace(CASE, attack="fgsm"),))))
    assert 4 <= row.tried < 40


# --- files that change during a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_that_change_during_a_run_are_refused(tmp_path, save):
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
def test_a_damaged_results_file_is_refused_when_a_run_is_resumed(tmp_path, content):
    loaded = load(PLAN)
    with open_folder(tmp_path / "run", loaded.plan) as folder:
        folder.begin(loaded)
    (tmp_path / "run" / "results.json").write_text(content, encoding="latin-1")
    with open_folder(tmp_path / "run", loaded.plan, resume=True) as folder, pytest.raises(ArgumentError, match="results"):
        folder.begin(loaded)


def test_a_block_under_the_name_of_another_is_ignored(tmp_path):
    loaded, store = load(replace(PLAN, block=10)), Files(tmp_path)
    first, second, *_ = loaded.tasks()
    store.put(loaded.measure(first))
    store.path(first).rename(store.path(second))
    assert store.get(second) is None


def test_a_block_with_changed_bits_is_ignored(tmp_path):
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


def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch, capsys):
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
    """If a run was killed before it wrote its plan, `--out DIR --resume` alone must not start the default run."""
    monkeypatch.setattr(command, "load", lambda plan: pytest.fail("another plan was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    assert cli.main(["bench", "--out", str(tmp_path / "run"), "--resume"]) == 2


def test_resuming_does_not_overwrite_an_unrelated_file(tmp_path):
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


def factory_with(tmp_path, line):
    (tmp_path / "net.py").write_text(FACTORY.format(line))
    return f"{tmp_path / 'net.py'}:Net"


def test_output_of_a_model_does_not_mix_with_the_json(tmp_path, capsys):
    words = [*WORDS, "--model", factory_with(tmp_path, "print('hello')"), "--out", str(tmp_path / "run"), "--format", "json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["records"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_model_that_exits_the_program_passes_no_gate(tmp_path, workers):
    model = factory_with(tmp_path, "self.calls > 3 and sys.exit(0)")
    words = [*WORDS, "--model", model, "--out", str(tmp_path / "run"), "--fail-under", "0.99", "--workers", workers]
    ended = subprocess.run([sys.executable, "-m", "robustkit", *words], env=ENV, capture_output=True, timeout=100)
    assert ended.returncode != 0


# --- workers -------------------------------------------------------------------------------------------------------------


def exit_at_once(log):
    with open(log, "a") as file:
        file.write("tried\n")
    os._exit(1)


class ExitsAtOnce:
    """Ends every worker before its first task, as in a script without `if __name__ == "__main__":`."""

    def __init__(self, log):
        self.log = log

    def __call__(self):
        raise AssertionError("not reached")

    def __reduce__(self):
        return exit_at_once, (self.log,)


@pytest.mark.slow
def test_workers_that_cannot_start_are_reported_soon_and_not_as_a_lack_of_memory(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RobustkitError, match="start"):
        list(Processes(2, patience=1).run(ExitsAtOnce(str(log)), range(2)))
    assert log.read_text().count("tried") <= 4


def test_a_preview_of_a_fast_model_attacks_a_whole_block():
    (row,) = preview(load(PLAN))
    block = load(PLAN).measure(Task(0, 0, 40, "x"))
    assert (row.images, row.tried) == (40, 40)
    assert (row.forwards, row.backwards) == (int(block.result.forwards.sum()), int(block.result.backwards.sum()))


# --- folders, previews and executors -------------------------------------------------------------------------------------

TWO = replace(PLAN, cases=(CASE, replace(CASE, attack="fgsm")), block=10)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two cases with four blocks each."""
    path, loaded = tmp_path_factory.mktemp("finished") / "run", load(TWO)
    with open_folder(path, loaded.plan) as folder:
        folder.begin(loaded)
        folder.write(loaded, list(outcomes(loaded, folder.store)))
    return path


@pytest.mark.parametrize(
    "files", [("results.json", ".lock"), (".lock", ".plan.toml.part"), (".lock", ".results.json.part"), ()]
)
def test_a_run_that_was_killed_before_it_wrote_its_plan_begins_again(finished, tmp_path, files):
    out = tmp_path / "run"
    out.mkdir()
    for name in files:
        empty = json.loads((finished / "results.json").read_text()) | {"records": []}
        (out / name).write_text(json.dumps(empty) if name == "results.json" else "half")
    with open_folder(out, load(TWO).plan, resume=True) as folder:
        assert folder.fresh


def test_the_plan_is_written_after_the_results(tmp_path, monkeypatch):
    """If a run is killed between the two, its folder can be used again: a plan without results would be refused."""
    order, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: order.append(target.name) or real(source, target))
    with open_folder(tmp_path / "run", load(PLAN).plan) as folder:
        folder.begin(load(PLAN))
    assert order == ["results.json", "plan.toml"]


def test_pictures_are_in_the_order_of_the_plan(tmp_path):
    loaded = load(TWO)
    done = list(outcomes(loaded))
    pages = []
    for number, order in enumerate((done, done[::-1])):
        with open_folder(tmp_path / str(number), loaded.plan) as folder:
            folder.begin(loaded)
            folder.write(loaded, order)
            pages.append((folder.path / "report.html").read_bytes())
    assert pages[0] == pages[1]


def copy_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("content", ["[]", "{}", "3", "{"])
def test_invalid_results_are_refused(finished, tmp_path, content):
    run = copy_run(finished, tmp_path)
    (run / "results.json").write_text(content)
    with pytest.raises(ArgumentError, match=r"has no readable results\.json"):
        read(run)


@pytest.mark.parametrize("content", ['{"records": 3}', '{"records": [{}]}'])
def test_results_with_invalid_records_are_refused(finished, tmp_path, content):
    run = copy_run(finished, tmp_path)
    (run / "results.json").write_text(content)
    with pytest.raises(ArgumentError):
        read(run)


SMALL = Request(
    model=["zoo:digits-mlp"], data="digits", limit=40, threat=["linf:0.1"], attack=["pgd:steps=3", "fgsm"], block=10
)


def test_resuming_with_other_options_is_refused(finished, tmp_path):
    run = copy_run(finished, tmp_path)
    with pytest.raises(ArgumentError, match=r"another plan \(different: limit"):
        bench_command(replace(SMALL, limit=30), RunOptions(run, resume=True))


def reversed_outcomes(*arguments):
    return reversed(list(outcomes(*arguments)))


def test_gates_do_not_depend_on_the_order_in_which_cases_finish(finished, tmp_path, monkeypatch, capsys):
    """The robust images of each case must stay with its record."""
    monkeypatch.setattr(command, "outcomes", reversed_outcomes)
    request = replace(SMALL, threat=["linf:0.1", "linf:0.02"], attack=["fgsm"])
    assert bench_command(request, RunOptions(tmp_path / "a", baseline=None)) == 0
    assert bench_command(request, RunOptions(tmp_path / "b", baseline=tmp_path / "a", fail_if_worse=0.0)) == 0
    assert "0 of 40 images lost, 0 won" in capsys.readouterr().out


def test_a_preview_extrapolates_from_the_images_that_it_attacked():
    loaded = load(replace(PLAN, limit=200, block=20))
    (row,) = preview(loaded)
    block = loaded.measure(Task(0, 0, 20, "x"))
    assert (row.images, row.tried) == (200, 20)
    assert row.forwards == 10 * int(block.result.forwards.sum())
    assert row.backwards == 10 * int(block.result.backwards.sum())
    assert row.seconds > 3 * block.seconds  # ten times in theory; the machine may be busy


@dataclass(frozen=True)
class Logging:
    """Logs a line for every task."""

    log: str

    def __call__(self):
        return self.run

    def run(self, task):
        with open(self.log, "a") as file:
            file.write(f"{task}\n")
        return task


@pytest.mark.slow
def test_workers_wait_until_their_results_are_consumed(tmp_path):
    """Otherwise results would fill the memory if the disk is slow."""
    log = tmp_path / "log"
    running = Processes(1).run(Logging(str(log)), range(100))
    next(running)
    time.sleep(1)
    assert len(log.read_text().splitlines()) <= 3
    assert len(list(running)) == 99


class KillsWorker(Logging):
    """Logs a line, and then kills its worker."""

    def run(self, task):
        super().run(task)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_task_that_kills_its_worker_runs_once_with_others_and_then_alone_patience_times(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(RobustkitError, match="killed its worker 2 times"):
        list(Processes(1, patience=2).run(KillsWorker(str(log)), [7]))
    assert log.read_text().split() == ["7"] * 3
