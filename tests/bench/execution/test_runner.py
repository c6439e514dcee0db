"""The runner: its records equal a slow recomputation, whatever the blocks, the batches and the other cases."""

import gc
import math
import statistics

import pytest
import torch
from torch import nn

from robustkit import FGSM, L2, MIFGSM, PGD, ClassifyAs, Linf, Misclassify, zoo
from robustkit._engine.state_guard import random_state
from robustkit.bench import Case, Plan
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.execution.runner import outcomes
from robustkit.data import load as load_data
from robustkit.errors import ArgumentError

NET = zoo.load("digits-mlp")
DATA = load_data("digits")


class Counting(nn.Module):
    """A model that counts its images, and records the largest batch."""

    def __init__(self, net=NET):
        super().__init__()
        self.net, self.images, self.batch_size, self.fail = net, 0, 0, None

    def forward(self, x):
        self.images, self.batch_size = self.images + len(x), max(self.batch_size, len(x))
        if self.fail and self.images > self.fail[0]:
            raise self.fail[1]
        return self.net(x)


class Noisy(nn.Module):
    """A model with noise from torch's global generator."""

    def forward(self, x):
        return NET(x) + 4 * torch.randn(len(x), 10)


class NotANumber(nn.Module):
    """NaN for bright images, the outputs of the plain network for the others."""

    def forward(self, x):
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.31, torch.nan, NET(x))


def measured(*cases, seed=0, offset=0, limit=None, batch_size=100, progress=lambda *_: None):
    cases = tuple(Case("zoo:digits-mlp", *case) for case in cases)
    plan = Plan(cases, "digits", offset, limit, seed, batch_size=batch_size)
    return sorted(outcomes(load(plan), progress=progress), key=lambda outcome: outcome.index)


def without_seconds(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def interval(k, n, z=1.959963984540054):
    """Wilson 1927 in closed form."""
    middle, spread = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return middle - spread, middle + spread


def predicted(x):
    with torch.no_grad():
        return torch.cat([NET(image[None]).argmax(1) for image in x])


def recompute(attack, threat, target, *, seed=0, offset=0, limit=None, batch_size=100):
    """The figures of a case, from the attack itself and image by image where possible."""
    last = len(DATA) if limit is None else min(offset + limit, len(DATA))
    clean, robust, success, sizes, backwards, net = [], [], [], [], 0, Counting()
    for first in range(offset, last, 100):
        x, y, ids = (values[first : min(first + 100, last)] for values in (DATA.x, DATA.y, torch.arange(len(DATA))))
        ref = y if target is None else NET(x).argmin(1) if target == "least" else torch.full_like(y, target)
        goal = Misclassify() if target is None else ClassifyAs()
        batches = [slice(i, i + batch_size) for i in range(0, len(x), batch_size)]
        results = [attack(net, x[b], ref[b], goal=goal, threat=threat, seed=seed, ids=ids[b]) for b in batches]
        x_adv, backwards = torch.cat([r.x_adv for r in results]), backwards + sum(int(r.backwards.sum()) for r in results)
        before, after, change = predicted(x) == y, predicted(x_adv), (x_adv.double() - x.double()).flatten(1)
        reached = after != y if target is None else after == ref
        lengths = change.abs().amax(1) if isinstance(threat, Linf) else change.square().sum(1).sqrt()
        clean, robust, success = (
            [*clean, *before.tolist()],
            [*robust, *(before & (after == y)).tolist()],
            [*success, *reached.tolist()],
        )
        sizes += lengths[reached].tolist()
    n = len(clean)
    low, high = interval(sum(robust), n)
    return {
        "n": n,
        "clean_accuracy": sum(clean) / n,
        "robust_accuracy": sum(robust) / n,
        "success_rate": sum(success) / n,
        "low": low,
        "high": high,
        "median_size": statistics.median(sizes),
        "forwards": net.images,
        "backwards": backwards,
    }


@pytest.mark.parametrize(
    ("case", "attack", "threat", "target", "options"),
    [
        (("linf:0.1", "fgsm"), FGSM(), Linf(0.1), None, {}),
        (("linf:1/16", "pgd:steps=5"), PGD(5), Linf(1 / 16), None, {"seed": 7, "offset": 100, "limit": 130}),
        (("l2:0.5", "pgd:steps=5"), PGD(5), L2(0.5), None, {"seed": 11, "limit": 99, "batch_size": 30}),
        (("linf:0.3", "mifgsm", "least-likely"), MIFGSM(), Linf(0.3), "least", {"limit": 201}),
        (("linf:0.2", "fgsm", "classify-as:3"), FGSM(), Linf(0.2), 3, {"offset": 300, "limit": 1000}),
        (("l2:2", "ifgsm:steps=3", "classify-as:0"), PGD(3, 2.0, random_start=False), L2(2.0), 0, {"seed": -5, "limit": 100}),
    ],
)
def test_a_record_equals_a_slow_recomputation(case, attack, threat, target, options):
    (outcome,) = measured(case, **options)
    expected = recompute(attack, threat, target, **options)
    assert {key: outcome.record[key] for key in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert 0 < expected["success_rate"] < 1  # otherwise the case would test little
    goal = "misclassify" if target is None else case[2]
    expected_specs = {"model": "zoo:digits-mlp", "data": "digits", "threat": case[0], "attack": case[1], "goal": goal}
    assert expected_specs.items() <= outcome.record.items()
    assert outcome.record["seed"] == options.get("seed", 0)


CASES = (("linf:0.1", "pgd:steps=3"), ("l2:1", "fgsm", "least-likely"), ("linf:0.2", "fgsm", "classify-as:3"))


def test_a_case_does_not_depend_on_the_other_cases():
    joint = measured(*CASES, limit=120)
    for case, outcome in zip(CASES, joint, strict=True):
        (alone,) = measured(case, limit=120)
        assert without_seconds(alone.record) == without_seconds(outcome.record)
        for ours, theirs in zip(alone.pictures, outcome.pictures, strict=True):
            assert (ours.adversarial == theirs.adversarial).all()


def figures(outcome):
    """The figures of a record that are sums over images."""
    record = outcome.record
    shares = ("clean_accuracy", "robust_accuracy", "success_rate")
    counts = [round(record[name] * record["n"], 6) for name in shares]
    return torch.tensor([*counts, record["forwards"], record["backwards"]], dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_noise_and_outcome_depend_on_the_image_and_not_on_the_run(case):
    single = [measured(case, offset=i, limit=1)[0] for i in range(100, 115)]
    (part,) = measured(case, offset=100, limit=15)
    (start,), (longer,) = measured(case, limit=100), measured(case, limit=115)
    torch.testing.assert_close(sum(map(figures, single)), figures(part))
    torch.testing.assert_close(figures(longer) - figures(start), figures(part))
    pictures = {picture.index: picture for outcome in single for picture in outcome.pictures}
    assert len(part.pictures) == 4
    for picture in part.pictures:
        assert picture.adversarial == pytest.approx(pictures[picture.index].adversarial, abs=1e-6)
        assert (picture.clean == DATA.x[picture.index].numpy()).all()
        assert picture.label == picture.clean_as == str(int(DATA.y[picture.index]))
        assert picture.adversarial_as == str(int(predicted(torch.from_numpy(picture.adversarial)[None])))


@pytest.mark.parametrize("goal", ["misclassify", "least-likely", "classify-as:3"])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_batches_are_at_most_batch_size_and_do_not_change_the_figures(use, goal, batch_size):
    (usual,) = measured(("linf:0.1", "pgd:steps=3", goal), limit=120)
    net = use(Counting())
    (other,) = measured(("linf:0.1", "pgd:steps=3", goal), limit=120, batch_size=batch_size)
    assert net.batch_size == min(batch_size, 100)
    assert figures(other).tolist() == figures(usual).tolist()
    assert other.record["median_size"] == pytest.approx(usual.record["median_size"], rel=1e-5)


def test_a_model_in_training_mode_is_measured_in_evaluation_mode_and_left_as_it_was(use):
    torch.manual_seed(0)
    noisy = use(nn.Sequential(nn.Dropout(0.9), NET, nn.BatchNorm1d(10, affine=False)))
    buffers = {name: value.clone() for name, value in noisy.state_dict().items()}
    noisy.train()
    state = random_state()
    (outcome,) = measured(("linf:0.1", "pgd:steps=3"), limit=120)
    assert noisy.training
    assert random_state() == state
    assert all(torch.equal(value, buffers[name]) for name, value in noisy.state_dict().items())
    assert [flag["name"] for flag in outcome.record["flags"]] == ["train-mode"]
    NET.eval()
    use(NET)
    (plain,) = measured(("linf:0.1", "pgd:steps=3"), limit=120)
    assert figures(outcome)[:3].tolist() == figures(plain)[:3].tolist()  # batch norm in evaluation mode is the identity here
    assert plain.record["flags"] == []


def test_a_stochastic_model_gets_a_note_and_reproducible_numbers(use):
    use(Noisy())
    case = ("linf:0.1", "pgd:steps=2")
    state = random_state()
    first, again = (measured(case, limit=130)[0] for _ in range(2))
    assert random_state() == state
    assert without_seconds(first.record) == without_seconds(again.record)
    assert [note["name"] for note in first.record["notes"]] == ["stochastic-target"]
    assert [flag["name"] for flag in first.record["flags"]] == ["train-mode", "undeclared-randomness"]
    torch.testing.assert_close(
        figures(first), figures(measured(case, limit=100)[0]) + figures(measured(case, offset=100, limit=30)[0])
    )
    assert without_seconds(measured(case, limit=130, seed=1)[0].record) != without_seconds(first.record) | {"seed": 1}
    declared = Noisy().eval()
    declared.stochastic = True
    use(declared)
    assert measured(case, limit=10)[0].record["flags"] == []


def test_a_nan_output_counts_as_misclassified(use):
    use(NotANumber())
    bright = DATA.x[:100].flatten(1).mean(1) > 0.31
    right = (predicted(DATA.x[:100]) == DATA.y[:100]) & ~bright
    assert 0.1 < right.double().mean() < 0.9
    for case in (("linf:1e-6", "fgsm"), ("linf:1e-6", "fgsm", "classify-as:3")):
        record = measured(case, limit=100)[0].record
        assert record["clean_accuracy"] == pytest.approx(right.double().mean().item())
        assert record["robust_accuracy"] == pytest.approx(right.double().mean().item())
    assert record["success_rate"] == ((predicted(DATA.x[:100]) == 3) & ~bright).double().mean().item()


def held_bytes():
    """The memory of all live tensors."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor
    }
    return sum(storages.values())


@pytest.mark.slow
def test_finished_blocks_keep_no_images():
    image = DATA.x[:1].numel() * 4
    memory = []
    measured(("linf:0.1", "fgsm"), progress=lambda block, was_stored: memory.append(held_bytes()))
    assert len(memory) == 4
    assert memory[-1] - memory[0] < 100 * image  # three further blocks keep less than the images of one


def test_progress_counts_every_image_once():
    calls = []
    measured(
        *CASES, limit=230, progress=lambda block, was_stored: calls.append((block.task.case, len(block.labels), was_stored))
    )
    # The first block of every case comes first, for the estimate of the remaining time.
    assert calls == [(case, 100, False) for case in range(3)] + [(c, n, False) for c in range(3) for n in (100, 30)]


def test_everything_is_checked_before_the_first_attack(use):
    net = use(Counting())
    for case in (("linf:0.1", "fgsm", "classify-as:10"), ("pixels:65", "fgsm"), ("linf:0.1", "nope"), ("l3:1", "fgsm")):
        net.images = 0
        with pytest.raises(ArgumentError):
            measured(("linf:0.1", "fgsm"), case, limit=10)
        bad_spec = case in (("linf:0.1", "nope"), ("l3:1", "fgsm"))
        assert net.images <= (0 if bad_spec else 20)  # the clean images and one gradient


def test_an_exception_of_the_model_names_the_model_even_late_in_a_run(use):
    net = use(Counting())
    net.fail = (250, OSError("two\nlines"))
    with pytest.raises(ArgumentError, match=r"'zoo:digits-mlp' raised OSError on images \(\d+, 1, 8, 8\): two lines"):
        measured(("linf:0.1", "pgd"), limit=100)


@pytest.mark.parametrize("error", [ZeroDivisionError("a defect"), RuntimeError("a defect"), TypeError("a defect")])
def test_an_exception_of_an_attack_is_not_blamed_on_the_model(monkeypatch, error):
    def broken(self, problem):
        raise error

    monkeypatch.setattr(FGSM, "run", broken)
    with pytest.raises(type(error), match=r"^a defect$"):
        measured(("linf:0.1", "fgsm"), limit=10)


class Hungry(nn.Module):
    """Runs out of memory on batches beyond a size, one for forward passes and one for gradients."""

    def __init__(self, limit, limit_with_gradient):
        super().__init__()
        self.batch_size = {False: limit, True: limit_with_gradient}

    def forward(self, x):
        if len(x) > self.batch_size[x.requires_grad]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return NET(x)


def test_an_attack_that_runs_out_of_memory_continues_with_smaller_batches(use):
    (plain,) = measured(("linf:0.1", "fgsm"), limit=80)
    use(Hungry(100, 25))
    (halved,) = measured(("linf:0.1", "fgsm"), limit=80)
    assert figures(halved)[:3].tolist() == figures(plain)[:3].tolist()
    assert [note["name"] for note in halved.record["notes"]] == ["batch-halved"]


def test_a_batch_that_is_too_large_even_without_an_attack_is_refused(use):
    use(Hungry(25, 25))
    with pytest.raises(ArgumentError, match="batch_size=80: model 'zoo:digits-mlp' ran out of memory; take a smaller one"):
        measured(("linf:0.1", "fgsm"), limit=80, batch_size=80)


class BrokenGradient(nn.Module):
    """A model whose forward pass works, and whose backward pass raises."""

    def forward(self, x):
        out = NET(x).exp()
        out += 1  # the backward pass of exp needs its unmodified output
        return out


def test_a_gradient_that_raises_is_refused_and_a_missing_gradient_is_flagged(use):
    use(BrokenGradient())
    with pytest.raises(
        ArgumentError, match=r"has a gradient that raised RuntimeError on images \(2, 1, 8, 8\): one of the var"
    ):
        measured(("linf:0.1", "fgsm"), limit=10)
    use(NoGradient())
    (outcome,) = measured(("linf:0.1", "fgsm"), limit=10)
    assert outcome.record["success_rate"] == pytest.approx(1 - outcome.record["clean_accuracy"])
    assert "flat-gradients" in {flag["name"] for flag in outcome.record["flags"]}


class NoGradient(nn.Module):
    def forward(self, x):
        return NET(x).detach()
