"""Edge cases of the bench that no other test covers."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from robustkit import FGSM, Linf, evaluate, zoo
from robustkit._engine.state_guard import random_state
from robustkit.bench import Case, Plan, run
from robustkit.bench.execution import preview
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.bench.plan import specs
from robustkit.bench.plan.model_specs import load_model
from robustkit.bench.results.block import Block, Task
from robustkit.bench.run_folder import open_folder
from robustkit.cli import main
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError

NET = zoo.load("digits-mlp")
DIGITS = load_data("digits")
PLAN = Plan(
    (Case("zoo:digits-mlp", "linf:0.1", "pgd:steps=5"), Case("zoo:digits-mlp", "linf:0.1", "fgsm")),
    "digits",
    limit=60,
    block=20,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("edges") / "run"
    run(PLAN, out=out)
    return out


def test_a_preview_scales_up_the_costs_of_a_few_images(monkeypatch):
    """As for a model so slow that only four images are attacked."""
    monkeypatch.setattr(preview, "CLEAN_SECONDS", 1e-9)
    loaded = load(PLAN)
    for index, row in enumerate(preview.preview(loaded)):
        tried = loaded.measure(Task(index, 0, 4, "x"))
        assert (row.case, row.images, row.tried) == (PLAN.cases[index], 60, 4)
        assert row.forwards == 15 * int(tried.result.forwards.sum())
        assert row.backwards == 15 * int(tried.result.backwards.sum())
        assert row.seconds > tried.seconds  # 15 times the time of four images
    # The preview does not change the run.
    assert [o.record["robust_accuracy"] for o in outcomes(loaded)] == [
        o.record["robust_accuracy"] for o in outcomes(load(PLAN))
    ]


def test_a_factory_makes_the_same_random_weights_each_time_and_restores_the_generators(tmp_path):
    (tmp_path / "nets.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 2)\n")
    torch.manual_seed(7)
    state = random_state()
    first, again = (load_model(f"{tmp_path}/nets.py:net") for _ in range(2))
    assert torch.equal(first.weight, again.weight)
    assert random_state() == state


@pytest.mark.slow
def test_a_factory_that_makes_another_model_in_each_process_is_refused(tmp_path, capfd):
    (tmp_path / "nets.py").write_text(
        "import os\nfrom torch import nn\n"
        "def net():\n"
        "    made = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    made[1].bias.data[0] = os.getpid()\n"
        "    return made\n"
    )
    plan = Plan((Case(f"{tmp_path}/nets.py:net", "linf:0.1", "fgsm"),), "digits", limit=40, block=10)
    with pytest.raises(ArgumentError, match="or is not reproducible"):
        run(plan, workers=2)


def test_a_label_that_is_no_class_is_refused_at_once_in_any_block():
    y = DIGITS.y.clone()
    y[-1] = 10
    with pytest.raises(ArgumentError, match=r"labels run from 0 to 10, .* must lie in \[0, 10\)"):
        evaluate(NET, (DIGITS.x, y), threat=Linf(0.1), attacks=FGSM())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_point_types_and_tensors_that_require_grad(dtype):
    x = DIGITS.x[:50].to(dtype).requires_grad_()
    net = NET if dtype == torch.bfloat16 else nn.Sequential(ToFloat32(), NET)
    report = evaluate(net, (x, DIGITS.y[:50]), threat=Linf(0.1), attacks=FGSM())
    plain = evaluate(NET, (DIGITS.x[:50], DIGITS.y[:50]), threat=Linf(0.1), attacks=FGSM())
    assert report.records[0]["robust_accuracy"] == pytest.approx(plain.records[0]["robust_accuracy"], abs=0.021)
    assert x.grad is None


class ToFloat32(nn.Module):
    def forward(self, x):
        return x.float()


def test_a_run_uses_the_threads_of_the_plan_and_restores_the_previous_number():
    counts, before = [], torch.get_num_threads()
    loaded = load(Plan(PLAN.cases, "digits", limit=20, threads=2))
    measure = loaded._measure
    loaded._measure = lambda task: counts.append(torch.get_num_threads()) or measure(task)
    list(outcomes(loaded))
    assert set(counts) == {2}
    assert torch.get_num_threads() == before


def test_seconds_are_those_of_all_blocks():
    loaded, seconds = load(PLAN), {0: [], 1: []}
    done = list(outcomes(loaded, progress=lambda block, was_stored: seconds[block.task.case].append(block.seconds)))
    for outcome in done:
        assert outcome.record["seconds"] == pytest.approx(sum(seconds[outcome.index]))
        assert len(seconds[outcome.index]) == 3


def test_a_folder_with_only_a_lock_begins_a_run(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".results.json.part").write_text("half a fi")
    assert len(run(PLAN, out=out, resume=True).records) == 2


def test_the_results_of_an_unfinished_run_have_the_number_of_all_cases(tmp_path):
    loaded = load(PLAN)
    with open_folder(tmp_path / "run", loaded.plan) as folder:
        folder.begin(loaded)
        assert json.loads((tmp_path / "run" / "results.json").read_text())["cases"] == 2
        first = next(iter(outcomes(loaded)))
        assert folder.write(loaded, [first])["cases"] == 2


def test_a_finished_run_is_not_called_unfinished(made, capsys):
    assert main(["report", str(made)]) == 0
    assert "cases are finished" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: next((out / "examples").rglob("*.safetensors")).unlink(), "has 40 of the 60 images"),
        (lambda out: edit(out, "threat", "linf:0.2"), "results.json and plan.toml do not belong together"),
        (lambda out: (out / "results.json").write_text("[]"), "has no readable results.json"),
        (lambda out: (out / "plan.toml").unlink(), "cannot be read"),
    ],
)
def test_a_folder_that_was_changed_by_hand_is_refused(made, tmp_path, damage, message, capsys):
    out = tmp_path / "run"
    shutil.copytree(made, out)
    damage(out)
    for words in (["report", str(out)], ["compare", str(made), str(out)]):
        assert main(words) == 2
        assert message in capsys.readouterr().err


def edit(out, name, value):
    results = json.loads((out / "results.json").read_text())
    results["records"][0][name] = value
    (out / "results.json").write_text(json.dumps(results))


def test_a_margin_allows_a_loss_of_its_size_and_no_larger_one(made, tmp_path):
    """In the baseline 6 of 60 images, 10 %, are set to robust in every case."""
    out = tmp_path / "run"
    shutil.copytree(made, out)
    changed = set_robust(out, 6)
    words = [
        "bench",
        "--model",
        "zoo:digits-mlp",
        "--data",
        "digits",
        "--limit",
        "60",
        "--block",
        "20",
        "--threat",
        "linf:0.1",
        "--attack",
        "pgd:steps=5",
        "--attack",
        "fgsm",
        "--baseline",
        str(out),
    ]
    assert changed == 6
    assert main([*words, "--fail-if-worse", "0.1", "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--fail-if-worse", "0.099", "--out", str(tmp_path / "b")]) == 1
    assert main([*words, "--out", str(tmp_path / "c")]) == 1  # without a margin no loss is allowed


def set_robust(out, images):
    weak = None
    for case in sorted((out / "examples").iterdir()):
        file = min(case.iterdir())
        block = Block.load(file)
        if weak is None:
            weak = np.flatnonzero(~block.robust)[:images]
        block.robust[weak] = True
        file.write_bytes(block.to_bytes())
    return len(weak)


def test_the_batches_of_a_loader_are_concatenated():
    pairs = [(torch.from_numpy(np.asarray(DIGITS.x[i : i + 10])), DIGITS.y[i : i + 10]) for i in range(0, 30, 10)]
    whole = evaluate(NET, (DIGITS.x[:30], DIGITS.y[:30]), threat=Linf(0.1), attacks=FGSM())
    assert evaluate(NET, pairs, threat=Linf(0.1), attacks=FGSM()).records[0]["data_hash"] == whole.records[0]["data_hash"]


class Postprocessed(nn.Module):
    """A function of the logits of the first classes of the small model."""

    def __init__(self, after, classes=10):
        super().__init__()
        self.net, self.after, self.classes = NET, after, classes

    def forward(self, x):
        return self.after(self.net(x)[:, : self.classes])


def record_of(net, images, attack="pgd:steps=3"):
    return evaluate(net.eval(), images, threat=Linf(0.05), attacks=specs.attack(attack)).records[0]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("attack", ["standard", "apgd", "apgd:loss=dlr", "fmn", "square:queries=20"])
def test_two_and_three_classes(classes, attack):
    keep = (DIGITS.y < classes).nonzero().squeeze(1)[:20]
    images = DIGITS.images(slice(0, len(DIGITS)))[keep], DIGITS.y[keep]
    record = record_of(Postprocessed(lambda out: out, classes), images, attack)
    with torch.no_grad():
        right = NET(images[0])[:, :classes].argmax(1) == images[1]
    assert record["clean_accuracy"] == float(right.double().mean())
    assert record["robust_accuracy"] <= record["clean_accuracy"]
    assert record["flags"] == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_count_as_misclassified_and_are_flagged(value):
    """Whichever class argmax would return."""
    images = DIGITS.images(slice(0, 60)), DIGITS.y[:60]
    record = record_of(Postprocessed(lambda out: out.index_fill(1, torch.tensor(9), value)), images)
    assert (record["clean_accuracy"], record["robust_accuracy"]) == (0.0, 0.0)
    (flag,) = record["flags"]
    assert (flag["name"], "60 of 60" in flag["why"]) == ("undefined-outputs", True)


def test_a_model_that_returns_probabilities_gets_a_note():
    images = DIGITS.images(slice(0, 20)), DIGITS.y[:20]
    for after, names in ((lambda out: out.softmax(1), ["probabilities"]), (lambda out: out.log_softmax(1), [])):
        assert [note["name"] for note in record_of(Postprocessed(after), images)["notes"]] == names


@pytest.mark.parametrize("n", [1, 7])
def test_a_model_that_fails_on_a_single_image_is_measured(n, use):
    """Also if the last batch of the clean accuracy has a single image."""

    def needs_two(out):
        if len(out) == 1:
            raise ValueError("one is too few")
        return out

    use(Postprocessed(needs_two))
    plan = Plan((Case("any", "linf:0.1", "pgd:steps=3"),), "digits", limit=n, batch_size=3)
    (record,) = run(plan).records
    use(NET)
    assert record["robust_accuracy"] == run(plan).records[0]["robust_accuracy"]
    (note,) = [note for note in record["notes"] if note["name"] == "fails-alone"]
    assert "one is too few" in note["why"]
