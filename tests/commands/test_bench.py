"""`robustkit bench`: the folder, the exit code and the output of a request."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from robustkit import cli
from robustkit.bench import read_plan
from robustkit.bench.plan.hashes import hash_matches
from robustkit.bench.plan.request import Request
from robustkit.commands import bench as command
from robustkit.commands.bench import RunOptions, bench_command
from robustkit.errors import ArgumentError

SMALL = Request(
    model=["zoo:digits-mlp"],
    data="digits",
    limit=30,
    threat=["linf:0.1"],
    attack=["fgsm", "pgd:steps=3"],
    goal=["misclassify", "least-likely"],
    block=10,
)


def results(out):
    return json.loads((out / "results.json").read_text())


def without_seconds(value):
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key != "seconds"}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("finished_run") / "run"
    assert bench_command(SMALL, RunOptions(out)) == 0
    return out


def test_two_equal_runs_differ_only_in_seconds(finished_run, tmp_path, capsys):
    bench_command(SMALL, RunOptions(tmp_path / "again"))
    first, second = results(finished_run), results(tmp_path / "again")
    assert first != second
    assert without_seconds(first) == without_seconds(second)
    assert [record["seconds"] > 0 for record in first["records"]] == [True] * 4
    assert {path.name for path in finished_run.iterdir()} == {".lock", "results.json", "report.html", "plan.toml", "examples"}


def test_the_written_plan_gives_the_same_numbers(finished_run, tmp_path, capsys):
    assert bench_command(Request(plan=finished_run / "plan.toml"), RunOptions(tmp_path / "again")) == 0
    assert without_seconds(results(tmp_path / "again")) == without_seconds(results(finished_run))
    assert (tmp_path / "again" / "plan.toml").read_bytes() == (finished_run / "plan.toml").read_bytes()


def test_the_table_has_the_figures_of_the_file_and_the_path_of_the_report(tmp_path, capsys):
    out = tmp_path / "[bold]a run :smile:"
    bench_command(SMALL, RunOptions(out))
    printed = capsys.readouterr()
    assert printed.err == ""
    for record in results(out)["records"]:
        assert f"{record['robust_accuracy']:.1%}" in printed.out
        assert f"{record['success_rate']:.1%}" in printed.out
    assert printed.out.splitlines()[-1] == f"report: {out}/report.html"
    assert (out / "report.html").read_text().count("<html") == 1


def test_the_json_output_is_results_json_and_the_gates(tmp_path, capsys):
    out = tmp_path / "run"
    assert bench_command(SMALL, RunOptions(out, format="json", fail_under=0.0)) == 0
    printed = json.loads(capsys.readouterr().out)
    (gate,) = printed.pop("gates")
    assert gate["passed"] is True
    assert printed.pop("out") == str(out)
    assert printed == results(out)


PRINTING = """
import torch
class Prints(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
    def forward(self, x):
        print("I am a model")
        return self.net(x.flatten(1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_output_of_a_model_goes_to_standard_error(tmp_path, workers):
    (tmp_path / "nets.py").write_text(PRINTING)
    words = ["--model", "nets.py:Prints", "--data", "digits", "--limit", "20", "--block", "10", "--threat", "linf:0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "robustkit", "bench", *words, "--format", "json", "--workers", workers],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"][0]["n"] == 20
    assert "I am a model" in done.stderr


def test_files_are_written_after_every_case(tmp_path, monkeypatch, capsys):
    seen, real = [], command.outcomes

    def watched(*arguments):
        for outcome in real(*arguments):
            yield outcome
            seen.append(len(results(tmp_path / "out")["records"]))

    monkeypatch.setattr(command, "outcomes", watched)
    bench_command(SMALL, RunOptions(tmp_path / "out"))
    assert seen == [1, 2, 3, 4]


def failing(after, error):
    real = command.outcomes

    def stopped(*arguments):
        for count, outcome in enumerate(real(*arguments)):
            if count == after:
                raise error
            yield outcome

    return stopped


def test_an_interruption_keeps_finished_cases_and_prints_the_command_that_resumes(finished_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr(command, "outcomes", failing(2, KeyboardInterrupt()))
        assert bench_command(SMALL, RunOptions(out)) == 130
    assert capsys.readouterr().err == (
        f"robustkit: finished blocks are in {out}; continue with: robustkit bench --out '{out}' --resume\n"
    )
    assert len(results(out)["records"]) == 2
    assert cli.main(["bench", "--out", str(out), "--resume"]) == 0
    assert without_seconds(results(out)) == without_seconds(results(finished_run))


def test_a_defect_keeps_finished_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "outcomes", failing(2, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        bench_command(SMALL, RunOptions(tmp_path / "out"))
    assert len(results(tmp_path / "out")["records"]) == 2


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path):
    with pytest.raises(ArgumentError):
        bench_command(replace(SMALL, model=["zoo:nope"]), RunOptions(tmp_path / "new" / "out"))
    assert list(tmp_path.iterdir()) == []


def test_only_missing_and_damaged_blocks_are_computed_again(finished_run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished_run, out)
    gone = sorted((out / "examples").rglob("*.safetensors"))[3]
    gone.unlink()
    damaged = sorted((out / "examples").rglob("*.safetensors"))[7]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    done, real = [], command.load

    def watched(plan):
        loaded = real(plan)
        measure = loaded.measure
        loaded.measure = lambda task: done.append(task) or measure(task)
        return loaded

    monkeypatch.setattr(command, "load", watched)
    before = {path: path.stat().st_mtime_ns for path in (out / "examples").rglob("*.safetensors")}
    assert bench_command(Request(), RunOptions(out, resume=True)) == 0
    assert {task.name for task in done} == {path.stem.partition("-")[2] for path in (gone, damaged)}
    after = {path: path.stat().st_mtime_ns for path in (out / "examples").rglob("*.safetensors")}
    assert after.keys() - before.keys() == {gone}
    assert [path for path in before if after[path] != before[path]] == [damaged]
    assert without_seconds(results(out)) == without_seconds(results(finished_run))


@pytest.mark.slow
def test_the_number_of_workers_changes_no_result(finished_run, tmp_path, capsys):
    assert bench_command(SMALL, RunOptions(tmp_path / "run", workers=2)) == 0
    assert without_seconds(results(tmp_path / "run")) == without_seconds(results(finished_run))
    ours, theirs = (sorted((out / "examples").rglob("*.safetensors")) for out in (finished_run, tmp_path / "run"))
    assert [path.relative_to(finished_run) for path in ours] == [path.relative_to(tmp_path / "run") for path in theirs]


def test_adversarial_images_are_saved_on_request(finished_run, tmp_path, capsys):
    from safetensors.torch import load_file

    assert bench_command(replace(SMALL, save_adversarial=True), RunOptions(tmp_path / "run")) == 0
    files = sorted((tmp_path / "run" / "examples" / "case-01").iterdir())
    assert [tuple(load_file(file)["x_adv"].shape) for file in files] == [(10, 1, 8, 8)] * 3
    assert all("x_adv" not in load_file(file) for file in (finished_run / "examples").rglob("*.safetensors"))
    assert without_seconds(results(tmp_path / "run"))["records"] == without_seconds(results(finished_run))["records"]
    assert "--save-adversarial" in results(tmp_path / "run")["command"]


def test_gates_decide_the_exit_code_and_are_printed(finished_run, tmp_path, capsys):
    share = results(finished_run)["worst_case"][0]["robust_accuracy"]
    assert bench_command(SMALL, RunOptions(tmp_path / "a", fail_under=share)) == 0
    assert "gate passed" in capsys.readouterr().out
    junit = tmp_path / "deep" / "junit.xml"
    assert bench_command(SMALL, RunOptions(tmp_path / "b", fail_under=share + 0.01, junit=junit)) == 1
    assert "gate FAILED" in capsys.readouterr().out
    assert len(ElementTree.parse(junit).findall(".//failure")) == 1


def test_a_baseline_is_compared_with_image_by_image(finished_run, tmp_path, capsys):
    assert bench_command(SMALL, RunOptions(tmp_path / "a", baseline=finished_run)) == 0
    weak = replace(SMALL, attack=["fgsm"])
    for unlike, message in [
        (weak, "attacked in the same way"),
        (replace(SMALL, limit=20), "data_hash"),
        (replace(SMALL, threat=["linf:0.2"]), "no record in common"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            bench_command(unlike, RunOptions(tmp_path / "b", baseline=finished_run))
    unfinished = tmp_path / "half"
    shutil.copytree(finished_run, unfinished)
    content = results(unfinished)
    (unfinished / "results.json").write_text(json.dumps(content | {"records": content["records"][:1]}))
    with pytest.raises(ArgumentError, match="has finished 1 of 4 cases; continue it with: robustkit bench --out"):
        bench_command(SMALL, RunOptions(tmp_path / "b", baseline=unfinished))
    for junit in (tmp_path, tmp_path / "half" / "plan.toml" / "x.xml"):
        with pytest.raises(ArgumentError, match=r"junit=.* cannot be written"):
            bench_command(SMALL, RunOptions(tmp_path / "b", junit=junit))
    with pytest.raises(ArgumentError, match="a gate needs an attack with goal misclassify"):
        bench_command(replace(SMALL, goal=["least-likely"]), RunOptions(tmp_path / "b", fail_under=0.5))
    assert not (tmp_path / "b").exists()  # before any work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fail_under": 90}, r"fail_under=90 must lie in \[0, 1\]: write 0.9 for 90 %"),
        ({"fail_under": -0.1}, r"fail_under=-0.1 must lie in \[0, 1\]"),
        ({"fail_if_worse": 0.1}, "fail_if_worse=0.1 needs --baseline RUN"),
        ({"format": "xml"}, "format='xml' must be text or json"),
        ({"workers": 0}, "workers=0 must be at least 1"),
    ],
)
def test_invalid_options_are_refused_before_any_work(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(command, "load", lambda plan: pytest.fail("the plan was loaded"))
    with pytest.raises(ArgumentError, match=message):
        bench_command(SMALL, RunOptions(tmp_path / "out", **options))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_estimates_the_cost_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench_command(replace(SMALL, block=None, attack=["ifgsm:steps=4"], goal=None), RunOptions(dry_run=True)) == 0
    printed = capsys.readouterr().out
    # With keep="first" solved examples are skipped, so there are at most 4 gradients per image.
    (row,) = [line.split() for line in printed.splitlines() if "ifgsm" in line]
    forwards, backwards = (int(word.replace(",", "")) for word in row[3:5])
    assert 30 < backwards <= 4 * 30
    assert backwards + 30 <= forwards <= backwards + 3 * 30
    assert "1 case of 30 images" in printed
    assert "at most 33.7 points wide" in " ".join(printed.split())  # Wilson's interval at one half: z / sqrt(n + z * z)
    assert list(tmp_path.iterdir()) == []


def test_the_names_are_listed(capsys):
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in ("zoo:digits-mlp", "mnist-5k", "linf:8/255", "pixels:1", "pgd:steps=", "mifgsm:", "fgsm", "least-likely"):
        assert name in printed


def test_a_plan_on_other_weights_is_refused(finished_run, tmp_path):
    text = (finished_run / "plan.toml").read_text()
    pin = read_plan(finished_run / "plan.toml").expected_hashes["zoo:digits-mlp"]
    (tmp_path / "plan.toml").write_text(text.replace(pin, "0123456789abcdef"))
    with pytest.raises(ArgumentError, match=rf"'zoo:digits-mlp' has the hash {pin}, but the plan was made with 0123456789abc"):
        bench_command(Request(plan=tmp_path / "plan.toml"), RunOptions(tmp_path / "out"))


CODE = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)
    def forward(self, x):
        return self.net((x.flatten(1) - {mean}) / 0.5)
"""


def test_a_changed_model_code_is_refused_even_with_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(CODE.format(mean=0.3))
    request = Request(model=["nets.py:Net"], data="digits", limit=30, block=10, threat=["linf:0.1"], attack=["fgsm"])
    assert bench_command(request, RunOptions(tmp_path / "run")) == 0
    before = results(tmp_path / "run")
    next((tmp_path / "run" / "examples").rglob("*.safetensors")).unlink()
    for mean, message in ((0.9, "has the hash"), (0.30001, "has other outputs than when this run began")):
        (tmp_path / "nets.py").write_text(CODE.format(mean=mean) + "# a comment\n" * round(mean))
        with pytest.raises(ArgumentError, match=message):
            bench_command(Request(), RunOptions(tmp_path / "run", resume=True))
    (tmp_path / "nets.py").write_text(CODE.format(mean=0.9))
    with pytest.raises(ArgumentError, match="the plan was made with"):
        bench_command(Request(plan=tmp_path / "run" / "plan.toml"), RunOptions(tmp_path / "again"))
    (tmp_path / "nets.py").write_text(CODE.format(mean=0.3) + "# another comment\n")
    assert bench_command(Request(), RunOptions(tmp_path / "run", resume=True)) == 0
    assert without_seconds(results(tmp_path / "run")) == without_seconds(before)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("abc 1.0 2.0", "abc 1.0 2.0", True),
        ("abc 1.0 2.0", "abc", True),
        ("abc 1.0 2.0", "abd 1.0 2.0", False),
        ("abc 1.001 2.0", "abc 1.0 2.0", True),
        ("abc 1.003 2.0", "abc 1.0 2.0", False),
        ("abc 1e-9 2.0", "abc 0 2.0", True),
        ("abc 1.0 2.003", "abc 1.0 2.0", False),
        ("abc nan nan", "abc nan nan", True),
        ("abc nan 1", "abc 0 1", False),
        ("abc 1.0 2.0", "abc x y", False),
        ("abc 1.0 2.0", "abc 1.0", False),
        ("abc inf 1", "abc inf 1", True),
    ],
)
def test_a_hash_of_outputs_tolerates_only_rounding(actual, expected, same):
    assert hash_matches(actual, expected) is same


def test_a_cross_check_without_a_library_says_how_to_install_one(monkeypatch, capsys):
    packages = ("foolbox", "art", "torchattacks")
    # Loaded submodules are removed too, because they could be imported without the package.
    for name in {*packages, *(name for name in sys.modules if name.split(".")[0] in packages)}:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["crosscheck", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "5"]) == 2
    printed = capsys.readouterr().err
    assert "pip install 'robustkit[foolbox]'" in printed
    assert printed.count("\n") == 1


@pytest.mark.slow
def test_a_cross_check_that_finds_a_difference_fails(monkeypatch, capsys):
    from robustkit.commands import crosscheck as module

    def differs(model, x, y):
        (row,) = (r for r in crosscheck(model, x, y, eps=(0.1,), eps_l2=(), libraries=["foolbox"]) if r.attack == "FGSM")
        return [replace(row, verdict="differs")]

    crosscheck = module.crosscheck
    monkeypatch.setattr(module, "crosscheck", differs)
    assert cli.main(["crosscheck", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "5"]) == 1
    assert "0 of 1 agree" in capsys.readouterr().out
