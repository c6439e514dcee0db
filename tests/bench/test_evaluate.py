"""The bench for Python: the same numbers as the attack and the command line, for data in any form."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robustkit
from robustkit import FGSM, L2, PGD, Linf, Normalize, Pixels, Target, evaluate, zoo
from robustkit._engine.state_guard import random_state
from robustkit.bench import Case, Plan, run
from robustkit.data import load
from robustkit.errors import ArgumentError

NET = zoo.load("digits-mlp")
DIGITS = load("digits")
X, Y = DIGITS.x[:130], DIGITS.y[:130]


def test_the_figures_are_those_of_the_attack():
    report = evaluate(NET, (X, Y), threat=[Linf(0.1), L2(0.7)], attacks=[PGD(5), FGSM()], seed=3)
    assert [(r["threat"], r["attack"]) for r in report.records] == [
        (threat, repr(attack)) for threat in ("linf:0.1", "l2:0.7") for attack in (PGD(5), FGSM())
    ]
    for record, (threat, attack) in zip(
        report.records, [(t, a) for t in (Linf(0.1), L2(0.7)) for a in (PGD(5), FGSM())], strict=True
    ):
        parts = [slice(0, 100), slice(100, 130)]
        ids = torch.arange(130)
        results = [attack(NET, X[p], Y[p], threat=threat, seed=3, ids=ids[p]) for p in parts]
        assert record["success_rate"] == torch.cat([r.success for r in results]).double().mean().item()
        assert record["robust_accuracy"] == pytest.approx(1 - record["success_rate"])
        assert record["clean_accuracy"] == (NET(X).argmax(1) == Y).double().mean().item()
        assert record["forwards"] == sum(int(r.forwards.sum()) for r in results)
    assert [row["threat"] for row in report.worst_case] == ["linf:0.1", "l2:0.7"]
    for row in report.worst_case:
        assert row["robust_accuracy"] <= min(r["robust_accuracy"] for r in report.records if r["threat"] == row["threat"])


def test_objects_specs_loaders_and_plans_give_the_same_record():
    expected = evaluate({"zoo:digits-mlp": NET}, (X, Y), threat="linf:0.1", attacks=["pgd:steps=5"]).records[0]
    loader = DataLoader(TensorDataset(X, Y), batch_size=17)
    (planned,) = run(Plan((Case("zoo:digits-mlp", "linf:0.1", "pgd:steps=5"),), "digits", limit=130)).records
    others = [
        evaluate({"zoo:digits-mlp": NET}, loader, threat=Linf(0.1), attacks=["pgd:steps=5"]).records[0],
        evaluate({"zoo:digits-mlp": NET}, DIGITS, threat=Linf(0.1), attacks=["pgd:steps=5"], limit=130).records[0],
        evaluate({"zoo:digits-mlp": NET.forward}, [X, Y.int()], threat=Linf(0.1), attacks=["pgd:steps=5"]).records[0],
        evaluate({"zoo:digits-mlp": NET}, (X.numpy(), Y.numpy()), threat=Linf(0.1), attacks="pgd:steps=5").records[0],
        evaluate({"zoo:digits-mlp": Target(NET)}, (X, Y), threat=Linf(0.1), attacks=["pgd:steps=5"]).records[0],
        planned,
    ]
    other_name = evaluate(NET, (X, Y), threat=Linf(0.1), attacks=[PGD(5)]).records[0]
    assert other_name["model"] == type(NET).__name__
    for record in others:
        for key in (
            "n",
            "clean_accuracy",
            "robust_accuracy",
            "success_rate",
            "forwards",
            "backwards",
            "median_size",
            "model",
            "model_hash",
            "data_hash",
            "recipe",
            "attack",
            "threat",
        ):
            assert record[key] == expected[key], key


def test_several_models_are_evaluated_as_each_alone():
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    both = evaluate({"mlp": NET, "linear": Target(other, batch_size=7)}, (X, Y), threat=Linf(0.1), attacks=["fgsm"])
    alone = [evaluate(net, (X, Y), threat=Linf(0.1), attacks=["fgsm"]) for net in (NET, other)]
    assert [row["model"] for row in both.worst_case] == ["mlp", "linear"]
    for ours, theirs in zip(both.records, alone, strict=True):
        assert ours["robust_accuracy"] == theirs.records[0]["robust_accuracy"]
        assert ours["model_hash"] == theirs.records[0]["model_hash"]


def test_the_batch_size_of_a_target_is_the_largest_batch():
    batches = []

    def watched(x):
        batches.append(len(x))
        return NET(x)

    for size in (7, 120):
        batches.clear()
        evaluate(Target(watched, batch_size=size), (X, Y), threat=Linf(0.1), attacks=["fgsm"])
        assert max(batches) == size


def test_a_loader_is_read_only_up_to_the_limit():
    reads = []

    def endless():
        while True:
            reads.append(1)
            yield X[:10], Y[:10]

    record = evaluate(NET, endless(), threat=Linf(0.1), attacks=["fgsm"], limit=25).records[0]
    assert (record["n"], len(reads)) == (25, 3)


def test_a_report_has_text_html_and_a_table(tmp_path):
    report = evaluate({"<b>mine</b>": NET}, (X, Y), threat=Linf(0.1), attacks=[FGSM()])
    robust = f"{report.worst_case[0]['robust_accuracy']:.1%}"
    assert repr(report).splitlines()[0] == "Report"
    assert f"<b>mine</b>, linf:0.1: {report.worst_case[0]['clean_accuracy']:.1%} clean, {robust} robust at most" in repr(report)
    html = report._repr_html_()
    assert robust.replace("%", "") in html
    assert "<b>mine</b>" not in html
    report.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert robust.replace("%", "") in page
    assert page.count("data:image/png") == 4 * 3  # four images: clean, perturbation, adversarial
    assert "robustkit.evaluate(&lt;b&gt;mine&lt;/b&gt;, (x, y), threat=Linf(" in page
    screen = Console(width=80)
    with screen.capture() as capture:
        screen.print(report)
    assert robust in capture.get()


def test_model_and_random_state_of_the_caller_are_unchanged(capfd):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Dropout(0.5), zoo.load("digits-mlp"))
    net.train()
    state, threads = random_state(), torch.get_num_threads()
    report = evaluate(net, (X, Y), threat=Linf(0.1), attacks=["pgd:steps=2"])
    assert net.training
    assert random_state() == state
    assert torch.get_num_threads() == threads
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert capfd.readouterr() == ("", "")
    assert [flag["name"] for flag in report.records[0]["flags"]] == ["train-mode"]


def test_a_model_of_vectors_with_other_bounds():
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    x = 4 * torch.rand(40, 5) - 2
    y = net(x).argmax(1)
    report = evaluate(net, (x, y), threat=Linf(0.3, bounds=(-2.0, 2.0)), attacks=[PGD(10)])
    assert report.records[0]["threat"] == "linf:0.3 in (-2.0, 2.0)"
    assert report.pictures == ()
    # In closed form, away from the bounds: the margin that a perturbation of size eps can overcome.
    w = net.weight.detach()
    logits = net(x).detach()
    gap = logits.gather(1, y[:, None]) - logits
    reach = 0.3 * (w[y][:, None] - w[None]).abs().sum(2)
    breakable = (gap < reach).any(1)
    inside = (x.abs() < 1.7).all(1)
    attacks = [PGD(10), PGD(10, random_start=False)]
    sure = evaluate(net, (x[inside], y[inside]), threat=Linf(0.3, bounds=(-2.0, 2.0)), attacks=attacks)
    assert sure.worst_case[0]["robust_accuracy"] == pytest.approx((~breakable[inside]).double().mean().item())


def test_normalising_inside_the_model_is_the_same_as_outside():
    inside = nn.Sequential(Normalize(0.3, 0.5), NET)
    report = evaluate(inside, (X, Y), threat=Linf(0.1), attacks=["fgsm"])
    x = (X - 0.3) / 0.5
    by_hand = FGSM()(NET, x, Y, threat=Linf(0.2, bounds=(-0.6, 1.4)))
    assert report.records[0]["success_rate"] == pytest.approx(by_hand.success.double().mean().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": (X, Y[:5])}, "y is torch.int64 of shape .*; give images .* and one label"),
        ({"data": (X, Y.float())}, "y is torch.float32"),
        ({"data": (X[:0], Y[:0])}, "one label"),
        ({"data": (X, Y - 1)}, "one label"),
        ({"data": (X, Y + 9)}, r"must lie in \[0, 10\)"),
        ({"data": X}, "does not yield pairs|give images"),
        ({"data": 3}, "data=int does not yield pairs of tensors"),
        ({"data": [1, 2, 3]}, "data=list does not yield pairs"),
        ({"data": []}, "data=list does not yield pairs"),
        ({"data": (X * 255, Y)}, "bounds"),
        ({"threat": "linf"}, "threat 'linf' does not exist"),
        ({"threat": Linf(torch.full((130,), 0.1))}, "eps has a number for each example; a run needs one for all"),
        ({"threat": Pixels(65)}, "64 locations, and at least one must stay unchanged; take fewer"),
        ({"attacks": ["nope"]}, "attack 'nope' does not exist"),
        ({"attacks": "nope"}, "attack 'nope' does not exist"),
        ({"attacks": [PGD]}, r"attacks=<class .*PGD'> must be PGD\(steps=100\), or a name"),
        ({"threat": 0.1}, r"threat=0.1 must be Linf\(8 / 255\), or a name as on the command line"),
        ({"goals": 3}, 'goals=3 must be "misclassify"'),
        ({"goals": "nope"}, "goal 'nope' does not exist"),
        ({"goals": ["nope"]}, "goal 'nope' does not exist"),
        ({"goals": ["classify-as:10"]}, "has the classes 0 to 9"),
        ({"attacks": []}, "the plan has no case; name a model, a threat and an attack"),
        ({"attacks": ["fgsm", "fgsm"]}, "twice; remove one"),
        ({"limit": 0}, "limit=0 must be a whole number, at least 1"),
        ({"limit": 1.5}, "limit=1.5 must be a whole number"),
        ({"model": {1: NET}}, "the name 1 must be a string"),
        ({"model": {}}, "the plan has no case; name a model, a threat and an attack"),
        ({"model": 3}, "fn=3 must be callable"),
    ],
)
def test_an_invalid_argument_is_refused(arguments, message):
    given = {"model": NET, "data": (X, Y), "threat": Linf(0.1), "attacks": ["fgsm"]} | arguments
    with pytest.raises(ArgumentError, match=message):
        evaluate(given.pop("model"), given.pop("data"), **given)


def test_an_error_of_the_model_reaches_the_caller():
    def broken(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        evaluate(broken, (X, Y), threat=Linf(0.1), attacks=["fgsm"])
    assert caught.value.__notes__ == ["robustkit called a model with images of shape (N, 1, 8, 8), those of the data"]


PLAN = Plan((Case("zoo:digits-mlp", "linf:0.1", "fgsm"),), "digits", limit=40, block=10)


def test_a_plan_can_be_run_in_a_folder_and_resumed(tmp_path):
    report = run(PLAN, out=tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results == report.results
    assert run(PLAN, out=tmp_path / "run", resume=True).records == report.records
    with pytest.raises(ArgumentError, match="exists, and nothing is overwritten"):
        run(PLAN, out=tmp_path / "run")


@pytest.mark.slow
def test_a_script_can_use_several_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from robustkit.bench import Case, Plan, run\n"
        "if __name__ == '__main__':\n"
        "    plan = Plan((Case('zoo:digits-mlp', 'linf:0.1', 'fgsm'),), 'digits', limit=40, block=10)\n"
        "    print(run(plan, workers=2).records[0]['robust_accuracy'])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert float(done.stdout) == run(PLAN).records[0]["robust_accuracy"]


def test_evaluate_is_exported_by_the_package():
    assert robustkit.evaluate is evaluate
    assert "evaluate" in dir(robustkit)
