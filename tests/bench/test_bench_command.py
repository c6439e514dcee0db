"""`robustkit bench` from the request to the folder: the plan that it means, and files that say the same twice."""

import json
import shlex
import sys

import pytest

from robustkit import cli
from robustkit.bench import Case, Plan, command, default_plan, folder
from robustkit.bench.command import Request, bench_command, plan_of
from robustkit.bench.runner import run
from robustkit.cli import main
from robustkit.errors import ArgumentError

SMALL = Request(["zoo:digits-mlp"], "digits", 30, 0, ["linf:0.1"], ["fgsm", "pgd:steps=3"], ["misclassify", "least-likely"])
MODELS = ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")


def results(out):
    return json.loads((out / "results.json").read_text())


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def test_the_default_plan_is_what_the_readme_says():
    cases = [
        Case(model, "linf:0.3", attack, goal)
        for model in ("zoo:mnist-cnn", "zoo:mnist-cnn-robust")
        for attack, goal in [
            ("fgsm", "misclassify"), ("fgsm", "least-likely"), ("ifgsm", "misclassify"), ("pgd", "misclassify"),
        ]
    ]  # fmt: skip
    assert plan_of(Request()) == default_plan() == Plan(tuple(cases), "mnist-5k")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (Request(limit=5, seed=3), Plan(default_plan().cases, "mnist-5k", limit=5, seed=3)),
        (Request(["m"], "d", threat=["t"]), Plan((Case("m", "t", "pgd"),), "d")),
        (Request(["m", "m"], "d", threat=["t", "t"], attack=["a", "a"]), Plan((Case("m", "t", "a"),), "d")),
        (
            Request(["m", "n"], "d", 9, 8, ["t", "u"], ["a", "b"], ["g", "h"], 7, 6, "cuda"),
            Plan(tuple(Case(m, t, a, g) for m in "mn" for t in "tu" for a in "ab" for g in "gh"), "d", 8, 9, 7, 6, "cuda"),
        ),
        (
            Request(attack=["a"], data="d", threat=["t"]),
            Plan((Case("zoo:mnist-cnn", "t", "a"), Case("zoo:mnist-cnn-robust", "t", "a")), "d"),
        ),
        (Request(goal=["g"]), Plan(tuple(Case(case, "linf:0.3", "pgd", "g") for case in MODELS), "mnist-5k")),
        (Request(goal=["g"], model=["m"], data="d", threat=["t"]), Plan((Case("m", "t", "pgd", "g"),), "d")),
    ],
)
def test_a_request_means_every_combination_of_what_it_names(request_, expected):
    assert plan_of(request_) == expected


@pytest.mark.parametrize(("missing", "request_"), [("data", Request(["m"], threat=["t"])), ("threat", Request(["m"], "d"))])
def test_a_model_needs_data_and_a_threat(missing, request_):
    with pytest.raises(ArgumentError, match=f"--{missing} is missing; .* for example: robustkit bench --model m --data"):
        plan_of(request_)


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"offset": -1}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ArgumentError, match=f"{name}={value} must be at least"):
        plan_of(Request(**wrong))


def test_a_plan_without_cases_is_refused():
    with pytest.raises(ArgumentError, match="the plan holds no case"):
        Plan((), "digits")


@pytest.mark.parametrize(
    "request_",
    [
        Request(), SMALL, Request(["a b/c.py:net", "m"], "npz:x 'y'.npz", 0, -4, ["t"], None, ["g"], -2, 9, "cuda:1"),
    ],
)  # fmt: skip
def test_the_command_that_is_kept_asks_for_the_same_again(monkeypatch, request_):
    asked = []
    monkeypatch.setattr(command, "bench_command", lambda request, out: asked.append((request, out)))
    words = shlex.split(request_.command())
    assert words[:2] == ["robustkit", "bench"]
    assert main(words[1:]) == 0
    assert asked == [(request_, None)]


def test_two_equal_runs_differ_in_seconds_alone(tmp_path, capsys):
    for out in ("first", "second"):
        bench_command(SMALL, tmp_path / out)
    first, second = (results(tmp_path / out) for out in ("first", "second"))
    assert first != second
    assert timeless(first) == timeless(second)
    assert [record["seconds"] > 0 for record in first["records"]] == [True] * 4
    assert {path.name for path in (tmp_path / "first").iterdir()} == {"results.json", "report.html"}


def test_the_table_says_what_the_file_says_and_where_the_report_is(tmp_path, capsys):
    out = tmp_path / "[bold]a run :smile:"
    bench_command(SMALL, out)
    said = capsys.readouterr()
    assert said.err == ""
    for record in results(out)["records"]:
        assert f"{record['robust_accuracy']:.1%}" in said.out
        assert f"{record['success_rate']:.1%}" in said.out
    assert said.out.splitlines()[-1] == f"report: {out}/report.html"
    assert (out / "report.html").read_text().count("<html") == 1


def test_files_are_written_after_every_case(tmp_path, monkeypatch, capsys):
    seen = []

    def watched(plan, progress):
        for outcome in run(plan, progress):
            yield outcome
            seen.append(len(results(tmp_path / "out")["records"]))

    monkeypatch.setattr(command, "run", watched)
    bench_command(SMALL, tmp_path / "out")
    assert seen == [1, 2, 3, 4]


def failing(after, error):
    def stopped(plan, progress):
        for count, outcome in enumerate(run(plan, progress)):
            if count == after:
                raise error
            yield outcome

    return stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_what_was_finished_is_kept(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(command, "run", failing(2, error))
    with pytest.raises(type(error)):
        bench_command(SMALL, tmp_path / "out")
    assert [record["attack"] for record in results(tmp_path / "out")["records"]] == ["fgsm", "fgsm"]


def test_nothing_is_left_where_nothing_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "run", failing(0, ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        bench_command(SMALL, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "new_folder", lambda out: pytest.fail("a folder was made"))
    with pytest.raises(ArgumentError):
        bench_command(Request(limit=0), tmp_path / "out")


def test_a_cross_check_without_any_library_says_how_to_install_one(monkeypatch, capsys):
    packages = ("foolbox", "art", "torchattacks")
    # Their modules too: one that is loaded already would be found without a look at its package.
    for name in {*packages, *(name for name in sys.modules if name.split(".")[0] in packages)}:
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["crosscheck", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "5"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'robustkit[foolbox]'" in said
    assert said.count("\n") == 1


def test_a_cross_check_that_finds_a_difference_fails(monkeypatch, capsys):
    from dataclasses import replace

    from robustkit.bench import command

    def differs(model, x, y):
        (row,) = (r for r in crosscheck(model, x, y, eps=(0.1,), eps_l2=(), libraries=["foolbox"]) if r.attack == "FGSM")
        return [replace(row, verdict="differs")]

    crosscheck = command.crosscheck
    monkeypatch.setattr(command, "crosscheck", differs)
    assert cli.main(["crosscheck", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "5"]) == 1
    assert "0 of 1 agree" in capsys.readouterr().out
