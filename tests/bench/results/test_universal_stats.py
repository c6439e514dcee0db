"""Universal attacks in a run: their records, recomputed without the bench."""

import json

import numpy as np
import pytest
import torch

from robustkit import FGSM, L2, Linf, data, evaluate, zoo
from robustkit.attacks import Perturbation, UniversalPGD
from robustkit.bench.evaluate import run
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.universal import random_signs
from robustkit.bench.plan.plan import Case, Plan
from robustkit.bench.results.block import Block
from robustkit.bench.results.read_run import read
from robustkit.errors import ArgumentError

SHORT = "uap-pgd:epochs=2,starts=1"
MODELS = ("zoo:digits-mlp",)


def classes(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def test_the_rates_of_a_record_can_be_recomputed():
    """The perturbation is learned again on the training part, and every rate is computed on the held-out part."""
    plan = Plan((Case("zoo:digits-mlp", "linf:0.2", SHORT),), "digits", limit=150, block=40, seed=3)
    (record,) = run(plan).records
    net, pool, held = zoo.load("digits-mlp"), data.load("digits:train").part(0, 1000), data.load("digits").part(0, 150)
    threat = Linf(0.2)
    made = UniversalPGD(epochs=2, starts=1).learn(net, pool.x, pool.y, threat=threat, seed=3)
    before, after = classes(net, held.x), classes(net, (held.x + made.delta).clamp(0, 1))
    there = classes(net, pool.x) != classes(net, (pool.x + made.delta).clamp(0, 1))
    assert record["n"] == 150
    assert record["fooling_train"] == pytest.approx(float(there.double().mean()))
    assert record["fooling_held_out"] == pytest.approx(float((before != after).double().mean()))
    assert record["robust_accuracy"] == pytest.approx(float(((before == held.y) & (after == held.y)).double().mean()))
    assert record["success_rate"] == pytest.approx(float((after != held.y).double().mean()))
    fell = np.bincount(after[before != after].numpy())
    assert record["collapse"] == {"class": str(fell.argmax()), "share": pytest.approx(fell.max() / fell.sum())}
    signs = [classes(net, (held.x + random_signs(threat, held.x[:1], 3, k)).clamp(0, 1)) != before for k in range(3)]
    assert record["fooling_random"] == pytest.approx(float(torch.stack(signs).double().mean()))
    assert record["transfer"] == {}
    assert record["forwards"] == made.forwards + 2 * 150 - 150
    assert record["backwards"] == made.backwards


def test_random_signs_use_the_whole_eps():
    like = torch.zeros(1, 3, 5, 5)
    for threat in (Linf(0.2), L2(0.7)):
        delta = random_signs(threat, like, 0, 0)
        assert float(threat.size(delta, like)) == pytest.approx(threat.eps, rel=1e-6)
        assert delta.abs().unique().numel() == 1
        assert not torch.equal(delta, random_signs(threat, like, 0, 1))


def nets():
    torch.manual_seed(0)
    return {name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)).eval() for name in ("one", "two")}


def test_without_a_training_part_the_first_half_is_for_learning_and_not_scored():
    x, y = torch.rand(41, 1, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(41) % 4
    models = nets()
    report = evaluate(models, (x, y), threat=Linf(0.1), attacks=[UniversalPGD(epochs=1, starts=1), "fgsm"])
    for record in report.records:
        assert record["n"] == (21 if "Universal" in record["attack"] else 41)
    for name, other in (("one", "two"), ("two", "one")):
        (record,) = [r for r in report.records if r["model"] == name and "Universal" in r["attack"]]
        made = UniversalPGD(epochs=1, starts=1).learn(models[name], x[:20], y[:20], threat=Linf(0.1))
        x_adv = (x[20:] + made.delta).clamp(0, 1)
        changed = {key: float((classes(net, x[20:]) != classes(net, x_adv)).double().mean()) for key, net in models.items()}
        assert record["fooling_held_out"] == pytest.approx(changed[name])
        assert record["transfer"] == {other: pytest.approx(changed[other])}
        # The worst case covers every image, with the attacks that were run on it.
        (joint,) = [r for r in report.worst_case if r["model"] == name]
        robust = classes(models[name], FGSM().perturb(models[name], x, y, threat=Linf(0.1))) == y
        robust &= classes(models[name], x) == y
        robust[20:] &= classes(models[name], x_adv) == y[20:]
        assert joint["n"] == 41
        assert joint["robust_accuracy"] == pytest.approx(float(robust.double().mean()))


def test_a_single_image_is_refused():
    with pytest.raises(
        ArgumentError, match="learns from the first half and is scored on the rest, and there is only one image"
    ):
        evaluate(
            nets()["one"], (torch.rand(1, 1, 6, 6), torch.zeros(1, dtype=torch.int64)), threat=Linf(0.1), attacks="uap-pgd"
        )


def test_a_learned_perturbation_is_run_like_any_other_attack():
    x, y = torch.rand(10, 1, 6, 6), torch.arange(10) % 4
    made = Perturbation(torch.full((1, 1, 6, 6), 0.1), "hand")
    (record,) = evaluate(nets()["one"], (x, y), threat=Linf(0.1), attacks=[made]).records
    assert record["n"] == 10
    assert "fooling_train" not in record


@pytest.mark.slow
def test_workers_and_a_resumed_run_give_the_same_records(tmp_path):
    plan = Plan(
        (Case("zoo:digits-mlp", "linf:0.2", SHORT), Case("zoo:digits-mlp", "l2:1", SHORT)), "digits", limit=90, block=30
    )
    one, two = run(plan, out=tmp_path / "one"), run(plan, out=tmp_path / "two", workers=2)
    without = [{k: v for k, v in record.items() if k != "seconds"} for record in one.records]
    assert without == [{k: v for k, v in record.items() if k != "seconds"} for record in two.records]
    for path in (tmp_path / "one" / "examples" / "case-01").glob("0000030-*"):
        path.unlink()
    again = run(plan, out=tmp_path / "one", resume=True)
    assert without == [{k: v for k, v in record.items() if k != "seconds"} for record in again.records]


def test_a_run_that_is_read_has_the_perturbation(tmp_path):
    x, y = np.random.default_rng(0).integers(0, 255, (30, 6, 6), np.uint8), np.arange(30) % 4
    np.savez(tmp_path / "d.npz", x=x, y=y)
    (tmp_path / "m.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 4)).eval()\n"
    )
    plan = Plan((Case(f"{tmp_path}/m.py:net", "linf:0.1", SHORT),), f"npz:{tmp_path}/d.npz", block=4)
    run(plan, out=tmp_path / "run")
    read_back = read(tmp_path / "run")
    assert len(read_back.robust[0]) == json.loads((tmp_path / "run" / "results.json").read_text())["records"][0]["n"] == 15
    perturbations = [picture.perturbation for picture in read_back.pictures]
    first = sorted((tmp_path / "run" / "examples" / "case-01").glob("*"))[0]
    delta = Block.load(first).universal.delta.numpy()
    assert first.name.startswith("0000015-")
    assert perturbations
    assert all(np.array_equal(perturbation, delta) for perturbation in perturbations)
    assert np.abs(delta).max() == pytest.approx(0.1)
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'class="delta"' in page


def test_a_targeted_perturbation_leads_to_its_class():
    plan = Plan((Case("zoo:digits-mlp", "linf:0.3", "uap-pgd", "classify-as:3"),), "digits", limit=100)
    (record,) = run(plan).records
    assert record["collapse"]["class"] == "3"
    assert record["success_rate"] > 0.5


def test_a_perturbation_learned_without_gradient_signal_is_flagged():
    net = zoo.load("digits-mlp")
    held = data.load("digits").part(0, 60)
    report = evaluate(lambda x: net((x * 7).round() / 7), held, threat=Linf(0.1), attacks=["uap-pgd:epochs=2,starts=1"])
    assert [flag["name"] for flag in report.records[0]["flags"]] == ["flat-gradients"]


def test_a_perturbation_learned_without_some_classes_is_flagged():
    x, y = torch.rand(40, 1, 6, 6), (torch.arange(40) % 4).sort().values
    (record,) = evaluate(nets()["one"], (x, y), threat=Linf(0.1), attacks=["uap-pgd:epochs=2,starts=1"]).records
    (flag,) = record["flags"]
    assert flag["name"] == "learned-on-other-classes"
    assert flag["why"].startswith("2 of the 2 scored classes")


def test_an_additional_attack_never_increases_robust_accuracy():
    """The model is wrong on the first half and right on the second, the only half on which the universal attack is scored."""

    def halves(x):
        return torch.stack([x[:, 0, 0, 0], 1 - x[:, 0, 0, 0]], 1)

    x = torch.rand(20, 1, 2, 2)
    x[:10, 0, 0, 0], x[10:, 0, 0, 0] = 0.0, 1.0
    y = torch.zeros(20, dtype=torch.int64)
    for attacks in (["fgsm"], ["fgsm", "uap-pgd:epochs=1,starts=1"]):
        (joint,) = evaluate(halves, (x, y), threat=Linf(0.1), attacks=attacks).worst_case
        assert (joint["n"], joint["robust_accuracy"]) == (20, 0.5)


def test_layers_have_the_names_of_the_model():
    plan = Plan((Case("zoo:digits-mlp", "linf:0.2", "uap-singular:layer=1"),), "digits", limit=20)
    assert len(run(plan).records) == 1


def test_block_names_depend_on_the_training_images_and_the_other_models(tmp_path):
    case = Case("zoo:digits-mlp", "linf:0.2", SHORT)
    names = set()
    for cases, limit in (((case,), 60), ((case, Case("zoo:mnist-cnn", "linf:0.2", SHORT)), 60)):
        try:
            loaded = load(Plan(cases, "digits", limit=limit))
        except ArgumentError:  # the other model does not accept these images
            continue
        names.add(loaded.tasks()[0].name)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
    for limit in (40, 30):
        plan = Plan((case,), f"npz:{tmp_path}/d.npz", limit=limit)
        names.add(load(plan).tasks()[0].name)
    assert len(names) == 3
