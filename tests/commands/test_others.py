"""The other commands: their files and output agree with what the package computes."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robustkit import PGD, ClassifyAs, Linf, Misclassify, zoo
from robustkit.cli import main
from robustkit.data import load

NET = zoo.load("digits-mlp")
DIGITS = load("digits")
BENCH = ["bench", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "60", "--block", "20", "--threat", "linf:0.1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: pgd, pgd with another seed, and fgsm and pgd."""
    root = tmp_path_factory.mktemp("runs")
    assert main([*BENCH, "--attack", "pgd:steps=5", "--out", str(root / "a")]) == 0
    assert main([*BENCH, "--attack", "pgd:steps=5", "--seed", "1", "--out", str(root / "seed")]) == 0
    assert main([*BENCH, "--attack", "fgsm", "--attack", "pgd:steps=5", "--out", str(root / "both")]) == 0
    return root


def test_compare_counts_the_images_that_differ(runs, capsys):
    assert main(["compare", str(runs / "a"), str(runs / "both"), "--format", "json"]) == 0
    comparison = json.loads(capsys.readouterr().out)
    (pair,) = [pair for pair in comparison["pairs"] if pair["attack"] == "pgd:steps=5"]
    assert (pair["n"], pair["only_a"], pair["only_b"], pair["p"]) == (60, 0, 0, 1.0)
    robust = json.loads((runs / "a" / "results.json").read_text())["records"][0]["robust_accuracy"]
    assert pair["both"] == round(60 * robust)
    assert ["fgsm" in line for line in comparison["only_in_b"]] == [True]
    assert main(["compare", str(runs / "a"), str(runs / "a")]) == 0
    assert "1.0000" in capsys.readouterr().out


def test_report_writes_the_page_again(runs, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(runs / "both", out)
    page = (out / "report.html").read_bytes()
    assert page.count(b"data:image/png") == 2 * 4 * 3
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out}/report.html"


def test_report_states_that_a_run_is_unfinished(runs, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(runs / "both", out)
    results = json.loads((out / "results.json").read_text())
    del results["records"][0]
    (out / "results.json").write_text(json.dumps(results))
    shutil.rmtree(out / "examples" / "case-01")
    assert main(["report", str(out)]) == 0
    assert "1 of 2 cases are finished" in capsys.readouterr().out
    del results["records"][0]
    (out / "results.json").write_text(json.dumps(results))
    assert main(["report", str(out)]) == 2
    assert "has no finished case yet; continue it with: robustkit bench --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spec", "goal", "ref"),
    [("misclassify", Misclassify(), None), ("classify-as:3", ClassifyAs(), torch.full((60,), 3))],
)
def test_attack_writes_the_images_of_the_attack(tmp_path, capsys, spec, goal, ref):
    out = tmp_path / "new" / "images.npz"
    words = [
        "attack",
        "--model",
        "zoo:digits-mlp",
        "--data",
        "digits",
        "--offset",
        "5",
        "--limit",
        "60",
        "--threat",
        "linf:0.1",
    ]
    assert main([*words, "--attack", "pgd:steps=5", "--seed", "4", "--goal", spec, "--out", str(out)]) == 0
    x, y, ids = DIGITS.x[5:65], DIGITS.y[5:65], torch.arange(5, 65)
    result = PGD(5)(NET, x, y if ref is None else ref, goal=goal, threat=Linf(0.1), seed=4, ids=ids)
    saved = np.load(out)
    assert np.array_equal(saved["x"], result.x_adv.numpy())
    assert np.array_equal(saved["success"], result.success.numpy())
    assert np.array_equal(saved["size"], result.size.numpy())
    assert np.array_equal(saved["y"], y.numpy())
    assert np.array_equal(saved["index"], ids.numpy())
    again = load(f"npz:{out}")
    assert torch.equal(again.x, result.x_adv)
    assert torch.equal(again.y, y)
    assert capsys.readouterr().out.splitlines()[-1] == f"images: {out}"


NETS = """
from torch import nn
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.mark.slow
def test_train_writes_weights_that_bench_reads(tmp_path, capsys):
    (tmp_path / "nets.py").write_text(NETS)
    out = tmp_path / "w.safetensors"
    words = ["train", "--model", f"{tmp_path}/nets.py:net", "--data", "digits:train", "--epochs", "3", "--lr", "0.01"]
    assert main([*words, "--loss", "standard", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [f"epoch {n} of 3" for n in (1, 2, 3)]
    again = tmp_path / "again.safetensors"
    assert main([*words, "--loss", "standard", "--out", str(again)]) == 0
    assert out.read_bytes() == again.read_bytes()  # the same seed, the same weights
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    net.load_state_dict(load_file(out))
    accuracy = (net(DIGITS.x).argmax(1) == DIGITS.y).double().mean().item()
    assert accuracy > 0.85
    spec = f"{tmp_path}/nets.py:net@weights={out}"
    assert main(["bench", "--model", spec, "--data", "digits", "--threat", "linf:0.1", "--out", str(tmp_path / "r")]) == 0
    (record,) = json.loads((tmp_path / "r" / "results.json").read_text())["records"]
    assert record["clean_accuracy"] == accuracy


@pytest.mark.slow
def test_adversarial_training_raises_robust_accuracy(tmp_path, capsys):
    """For each of three seeds: adversarial training of a linear model is logistic regression with an L1 penalty."""
    (tmp_path / "nets.py").write_text(NETS)
    for seed in range(3):
        robust = {}
        for loss in ("standard", "madry"):
            out = tmp_path / f"{loss}-{seed}.safetensors"
            words = ["train", "--model", f"{tmp_path}/nets.py:net", "--data", "digits:train", "--epochs", "5", "--lr", "0.01"]
            words += ["--threat", "linf:0.1", "--attack", "fgsm", "--seed", str(seed), "--loss", loss]
            assert main([*words, "--out", str(out)]) == 0
            weights = load_file(out)
            # In closed form: the margin that no perturbation in the ball can overcome.
            logits = DIGITS.x.flatten(1) @ weights["1.weight"].T + weights["1.bias"]
            gap = logits.gather(1, DIGITS.y[:, None]) - logits
            reach = 0.1 * (weights["1.weight"][DIGITS.y][:, None] - weights["1.weight"][None]).abs().sum(2)
            robust[loss] = ((gap >= reach).sum(1) == 10).double().mean().item()
        assert robust["madry"] > robust["standard"] + 0.1, robust


def test_interrupted_training_writes_nothing(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("robustkit.commands.train.fit", stopped)
    words = ["train", "--model", f"{tmp_path}/nets.py:net", "--data", "digits", "--loss", "standard"]
    assert main([*words, "--out", str(tmp_path / "w.safetensors")]) == 130
    assert [path.name for path in tmp_path.glob("*.safetensors")] == []
