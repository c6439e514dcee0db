"""Models behind defences in the bench: specs, numbers recomputed on the guarded target, and runs that must not mix."""

import json

import pytest
import torch

from robustkit import PGD, Linf, Target, data, evaluate, zoo
from robustkit._engine.noise import Noise
from robustkit._engine.state_guard import fork_rng
from robustkit.attacks import Square
from robustkit.bench import Case, Plan, plan_text, read_plan, run
from robustkit.bench.comparison.compare import compare
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.plan.defence_specs import DEFENCES, defence_recipe, guard_target, settable_fields
from robustkit.bench.plan.model_specs import model_hash
from robustkit.bench.plan.request import Request, command_of, plan_of
from robustkit.bench.results.read_run import read
from robustkit.cli import main
from robustkit.defence import guards_of
from robustkit.defences import GaussianNoise, JPEGLike, MedianFilter, Quantise, RandomResize

NET = zoo.load("mnist-cnn")
MNIST = data.load("mnist-5k").part(0, 60)
X, Y = MNIST.images(slice(0, 60)), MNIST.y

FILE = """
import torch
from torch import nn
from robustkit.defence import Defence
from robustkit.defences import MedianFilter


class Dim(Defence):
    def __init__(self):
        super().__init__()
        self.share = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, noise=None):
        return self.share * x

    def views(self):
        return {"exact": self.forward, "brighter": lambda x: x}


class Fails(Dim):
    def forward(self, x, noise=None):
        raise KeyError("deep inside")


class Shrinks(Dim):
    def forward(self, x, noise=None):
        return x[:1]


def dim(): return Dim()
def fails(): return Fails()
def shrinks(): return Shrinks()
def median(): return MedianFilter(5)
def function(): return lambda x: x
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    made = tmp_path_factory.mktemp("defences") / "mine.py"
    made.write_text(FILE)
    return made


@pytest.mark.parametrize(
    ("spec", "recipe", "draws"),
    [
        ("quantise", "Quantise(levels=8)", 1),
        ("quantise:levels=4", "Quantise(levels=4)", 1),
        ("jpeg:quality=30", "JPEGLike(quality=30)", 1),
        ("median:size=5", "MedianFilter(size=5)", 1),
        ("gaussian-noise:sigma=1/8", "GaussianNoise(sigma=0.125)", 10),
        ("gaussian-noise:sigma=0.1,draws=3", "GaussianNoise(sigma=0.1)", 3),
        ("random-resize:low=0.8", "RandomResize(low=0.8, high=1.0)", 10),
    ],
)
def test_a_spec_gives_the_defence_with_its_fields(spec, recipe, draws):
    target = guard_target(spec, Target(NET))
    assert defence_recipe(target) == recipe
    assert target.draws == draws
    assert tuple(target.views) == tuple(guards_of(target)[0].views())


def test_none_gives_the_target_itself():
    target = Target(NET)
    assert guard_target("none", target) is target
    assert defence_recipe(target) is None


def test_stacked_defences_are_listed_in_the_order_in_which_they_are_applied():
    assert defence_recipe(MedianFilter().guard(Quantise(4).guard(NET))) == "MedianFilter(size=3) before Quantise(levels=4)"


def test_every_defence_of_the_package_has_a_spec():
    from robustkit import defences

    assert set(DEFENCES.values()) == {getattr(defences, name) for name in defences.__all__}
    for name in DEFENCES:  # the shown defaults are the actual ones
        shown = ",".join(f"{field}={value}" for field, value in settable_fields(name).items())
        assert defence_recipe(guard_target(f"{name}:{shown}", Target(NET))) == defence_recipe(guard_target(name, Target(NET)))


WRONG = {
    "jpg": ("'jpg' does not exist", "there are none, quantise, jpeg"),
    "": ("'' does not exist", "none, quantise"),
    "quantise:level=3": ("'level=3' is not a field=value of quantise", "levels, draws"),
    "quantise:levels": ("'levels' is not a field=value",),
    "quantise:levels=1": ("'quantise:levels=1'", "levels=1 must be a whole number, at least 2"),
    "quantise:levels=2.5": ("levels='2.5'", "a whole number"),
    "quantise:levels=3,levels=4": ("levels is given twice", "leave one out"),
    "gaussian-noise:sigma=0": ("'gaussian-noise:sigma=0'", "above zero"),
    "gaussian-noise:draws=0": ("draws=0 must be at least 1", "leave it out for 10"),
    "none.py:made": ("there is no file none.py",),
    "{}:function": ("returned function", "must return a robustkit.defence.Defence"),
    "{}:nope": ("has no function nope", "dim"),
    "{}:fails": ("raised KeyError", "deep inside", "must accept the images of the data"),
    "{}:shrinks": ("returned shape (1, 1, 28, 28)", "one image for each"),
}


@pytest.mark.parametrize("spec", WRONG)
def test_errors_of_defences_have_one_line(spec, file, tmp_path, capsys):
    words = [
        "bench",
        "--model",
        "zoo:mnist-cnn",
        "--data",
        "mnist-5k",
        "--limit",
        "4",
        "--threat",
        "linf:0.1",
        "--attack",
        "fgsm",
        "--defence",
        spec.format(file),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    for text in ("defence", *WRONG[spec]):
        assert text in said.err
    assert not (tmp_path / "out").exists()


def along_every_view(attack, target, seed=0):
    """Without the bench: each view attacks the images that are unsolved so far."""
    success = torch.zeros(60, dtype=torch.bool)
    for view in target.views:
        rows = (~success).nonzero().squeeze(1)
        if len(rows):
            result = attack(target.with_view(view), X[rows], Y[rows], threat=Linf(0.2), seed=seed, ids=rows)
            assert torch.equal(target.fn(result.x_adv).argmax(1) != Y[rows], result.success)
            success[rows] = result.success
    return success


@pytest.mark.parametrize(
    ("spec", "defence"),
    [("quantise:levels=6", Quantise(6)), ("jpeg:quality=40", JPEGLike(40)), ("median", MedianFilter())],
)
@pytest.mark.parametrize("attack", [PGD(steps=8, random_start=False), PGD(steps=5)])
def test_the_record_is_the_attack_called_on_the_guarded_target(spec, defence, attack):
    words = "pgd:steps=8,random_start=false" if not attack.random_start else "pgd:steps=5"
    (record,) = run(Plan((Case("zoo:mnist-cnn", "linf:0.2", words, defence=spec),), "mnist-5k", limit=60)).records
    target = defence.guard(Target(NET, batch_size=100))
    success = along_every_view(attack, target)
    assert record["robust_accuracy"] == pytest.approx(1 - float(success.double().mean()), abs=1e-12)
    assert record["clean_accuracy"] == float((target.fn(X).argmax(1) == Y).double().mean())
    assert (record["defence"], record["defence_recipe"], record["views"]) == (spec, repr(defence), list(defence.views()))
    assert 0 < success.sum() < 60


def test_attacks_without_gradients_run_once_along_no_view():
    (record,) = run(
        Plan((Case("zoo:mnist-cnn", "linf:0.3", "square:queries=30", defence="quantise"),), "mnist-5k", limit=60)
    ).records
    result = Square(queries=30)(Quantise(8).guard(Target(NET, batch_size=100)), X, Y, threat=Linf(0.3))
    assert record["robust_accuracy"] == pytest.approx(1 - float(result.success.double().mean()), abs=1e-12)
    assert record["forwards"] == int(result.forwards.sum())
    assert record["views"] == []


def test_a_random_defence_is_scored_on_fresh_draws():
    (record,) = run(
        Plan(
            (Case("zoo:mnist-cnn", "linf:0.2", "pgd:steps=5", defence="gaussian-noise:sigma=0.2,draws=2"),),
            "mnist-5k",
            limit=60,
        )
    ).records
    target = GaussianNoise(0.2).guard(Target(NET, batch_size=100), draws=2)
    with fork_rng(Noise(0, torch.arange(60)).at("model", 0).key):
        result = PGD(steps=5)(target, X, Y, threat=Linf(0.2))
    assert record["success_rate"] == float(result.success.double().mean())
    assert record["backwards"] == int(result.backwards.sum()) == 2 * 5 * 60
    assert "stochastic-target" in {note["name"] for note in record["notes"]}


def test_a_defence_of_a_file_has_its_views_and_its_weights(file):
    plan = Plan(
        (Case("zoo:mnist-cnn", "linf:0.2", "fgsm", defence=f"{file}:dim"), Case("zoo:mnist-cnn", "linf:0.2", "fgsm")),
        "mnist-5k",
        limit=60,
    )
    behind, plain = run(plan).records
    assert behind["views"] == ["exact", "brighter"]
    assert plain["views"] == ["exact"]
    assert plain["model_hash"] == model_hash(NET) != behind["model_hash"]
    with torch.no_grad():
        assert behind["clean_accuracy"] == float((NET(0.5 * X).argmax(1) == Y).double().mean())


def test_a_defence_without_weights_does_not_change_the_hash_of_the_model():
    (record,) = run(Plan((Case("zoo:mnist-cnn", "linf:0.2", "fgsm", defence="median"),), "mnist-5k", limit=4)).records
    assert record["model_hash"] == model_hash(NET)


WORDS = ["--model", "zoo:mnist-cnn", "--data", "mnist-5k", "--limit", "20", "--threat", "linf:0.2", "--attack", "fgsm"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert (
        main(["bench", *WORDS, "--defence", "none", "--defence", "quantise:levels=3", "--defence", "median", "--out", str(out)])
        == 0
    )
    return out


def test_every_combination_is_a_case_and_the_plan_can_be_read_again(made):
    plan = read_plan(made / "plan.toml")
    assert [case.defence for case in plan.cases] == ["none", "quantise:levels=3", "median"]
    assert [case.model_under_test for case in plan.cases][1] == "zoo:mnist-cnn behind quantise:levels=3"
    assert set(plan.expected_hashes) == {"mnist-5k", *(case.model_under_test for case in plan.cases)}
    assert len(set(plan.expected_hashes.values())) == 4  # the outputs of the defences differ
    assert read_plan_of(plan_text(plan), made) == plan
    results = json.loads((made / "results.json").read_text())
    assert [record["defence"] for record in results["records"]] == [None, "quantise:levels=3", "median"]
    assert [row["defence"] for row in results["worst_case"]] == [None, "quantise:levels=3", "median"]


def read_plan_of(text, folder):
    path = folder.parent / "copy.toml"
    path.write_text(text)
    return read_plan(path)


def test_lists_and_options_give_the_same_plan(tmp_path):
    (tmp_path / "plan.toml").write_text(
        'data = "digits"\nmodels = ["m"]\ndefences = ["none", "jpeg"]\nthreats = ["linf:0.1", "l2:1"]\nattacks = ["fgsm"]\n'
    )
    plan = read_plan(tmp_path / "plan.toml")
    request = Request(model=["m"], data="digits", threat=["linf:0.1", "l2:1"], attack=["fgsm"], defence=["none", "jpeg"])
    assert plan == plan_of(request)
    assert [(case.defence, case.threat) for case in plan.cases] == [
        (defence, threat) for defence in ("none", "jpeg") for threat in ("linf:0.1", "l2:1")
    ]
    assert command_of(plan) == request.command()
    assert "--defence none --defence jpeg" in command_of(plan)
    (tmp_path / "one.toml").write_text('data = "d"\n[[cases]]\nmodel = "m"\nthreat = "t"\nattack = "a"\n')
    assert read_plan(tmp_path / "one.toml").cases == (Case("m", "t", "a", "misclassify", "none"),)


def test_blocks_of_different_defences_have_different_names_and_a_resumed_run_does_not_mix(made, tmp_path, capsys):
    cases = [Case("zoo:mnist-cnn", "linf:0.2", "fgsm", defence=defence) for defence in ("none", "quantise:levels=3", "median")]
    names = {task.name for case in cases for task in load(Plan((case,), "mnist-5k", limit=20)).tasks()}
    assert len(names) == 3
    twice = [Case("zoo:mnist-cnn", "linf:0.2", "fgsm", defence=f"gaussian-noise:draws={draws}") for draws in (2, 3)]
    assert len({task.name for case in twice for task in load(Plan((case,), "mnist-5k", limit=20)).tasks()}) == 2
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    assert main(["bench", "--out", str(made), "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")} == before
    assert main(["bench", *WORDS, "--defence", "jpeg", "--out", str(made), "--resume"]) == 2
    assert "different: cases" in capsys.readouterr().err


def test_the_records_of_each_defence_are_read_separately(made, capsys):
    loaded = read(made)
    assert len(loaded.robust) == 3
    for record, robust in zip(loaded.results["records"], loaded.robust, strict=True):
        assert record["robust_accuracy"] == robust.mean()
    assert {picture.model for picture in loaded.pictures} == {
        case.model_under_test for case in read_plan(made / "plan.toml").cases
    }
    assert main(["report", str(made)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    clean = loaded.results["records"][1]["clean_accuracy"]
    assert f"zoo:mnist-cnn behind quantise:levels=3: {clean:.1%} correct of 20 images" in printed
    page = (made / "report.html").read_text()
    assert 'behind <b class="name">quantise:levels=3</b>' in page


def test_runs_are_compared_defence_by_defence(made):
    comparison = compare(read(made), read(made))
    assert [pair.defence_a for pair in comparison.pairs if not pair.worst_case] == [None, "quantise:levels=3", "median"]
    assert all(pair.only_a == pair.only_b == 0 for pair in comparison.pairs)


def test_starts_for_the_same_model_behind_the_same_defence_go_first(made):
    """The run also has adversarial images for other defences; those for the same defence are preferred."""
    plan = Plan((Case("zoo:mnist-cnn", "linf:0.2", "fgsm", defence="median"),), "mnist-5k", limit=20, start_from=(str(made),))
    (record,) = run(plan).records
    old = read(made).results["records"][2]
    starts = next(stage for stage in record["stages"] if stage["name"] == "starts")
    clean = next(stage for stage in record["stages"] if stage["name"] == "clean")
    assert starts["solved"] + clean["solved"] >= round(20 * old["success_rate"]) > 0


def test_a_preview_names_defences(capsys):
    assert main(["bench", *WORDS, "--defence", "none", "--defence", "median", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    plain, behind = (line.split()[0] for line in printed.splitlines() if "linf:0.2" in line)
    assert plain == behind == "zoo:mnist-cnn"
    assert printed.split().count("behind") == printed.split().count("median") == 1
    assert "2 cases of 20 images" in printed


def test_defences_are_listed(capsys):
    assert main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "defences\n  none\n  quantise:levels=8,draws=1\n" in printed
    assert "gaussian-noise:sigma=0.25,draws=10" in printed


def test_in_python_the_target_has_the_defence():
    targets = {"plain": NET, "guarded": Quantise(6).guard(Target(NET, batch_size=100)), "noisy": RandomResize().guard(NET)}
    report = evaluate(targets, (X, Y), threat=Linf(0.2), attacks=PGD(steps=5))
    behind = report.records[1]
    assert [row["defence"] for row in report.records] == [None, "Quantise(levels=6)", repr(RandomResize())]
    assert behind["views"] == ["bpda", "exact"]
    success = along_every_view(PGD(steps=5), targets["guarded"])
    assert behind["robust_accuracy"] == pytest.approx(1 - float(success.double().mean()), abs=1e-12)
    assert [row["defence"] for row in report.worst_case] == [row["defence"] for row in report.records]


def test_the_attack_command_writes_images_that_break_the_defence(tmp_path):
    import numpy as np

    out = tmp_path / "found.npz"
    words = ["attack", *WORDS[:4], *WORDS[6:], "--limit", "20", "--defence", "quantise:levels=6", "--out", str(out)]
    assert main(words) == 0
    with np.load(out) as held:
        wrong = Quantise(6).guard(NET).fn(torch.from_numpy(held["x"])).argmax(1).numpy() != held["y"]
        assert (wrong == held["success"]).all()
