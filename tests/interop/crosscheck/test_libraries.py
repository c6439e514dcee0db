"""The cross-check reports agreement and disagreement with other libraries."""

import copy
import io
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from robustkit import FGSM, L1, L2, PGD, Linf, Pixels, data, zoo
from robustkit._engine.state_guard import random_state
from robustkit.commands import crosscheck as command
from robustkit.errors import ArgumentError
from robustkit.interop.crosscheck import autoattack
from robustkit.interop.crosscheck import libraries as module
from robustkit.interop.crosscheck.cases import LIBRARIES, MARGIN, Case
from robustkit.interop.crosscheck.libraries import DIFFERENCES, comparison_table, crosscheck, library_versions

INSTALLED = [name for name, version in library_versions().items() if version]


@pytest.fixture(scope="module")
def rows(trained):
    return crosscheck(*trained, eps=(8 / 255, 0.2), eps_l2=(0.25, 1.0))


def test_foolbox_is_compared_here():
    assert "foolbox" in INSTALLED


def test_every_installed_library_agrees_on_a_trained_network(rows):
    assert {row.library for row in rows} == set(INSTALLED)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_foolbox_agrees_on_the_shipped_models(name):
    """Real images: Linf bit for bit, L2 within a millionth on 98 %, random starts at the same rate.

    `robustkit crosscheck` compares 256 images.
    """
    part = data.load(zoo.card(name).scores.data).part(limit=64)
    rows = crosscheck(zoo.load(name), part.x, part.y, eps=(8 / 255, 0.1, 0.3), eps_l2=(0.25,), libraries=["foolbox"])
    random = [row for row in rows if "random" in row.attack]
    linf = [row for row in rows if row.threat.startswith("linf") and row not in random]
    assert [(row.verdict, row.max_difference, row.n) for row in linf] == [("equal", 0.0, 64)] * 3 * 5
    l2 = [row for row in rows if row.threat.startswith("l2") and row not in random]
    assert len(l2) == 4
    assert all(row.verdict in ("equal", "close") and len(row.differing) <= 1 for row in l2)
    assert len(random) == 4
    assert all(row.verdict == "same rate" for row in random)
    assert any(0.05 < row.ours < 0.95 for row in rows)  # not all of them trivial


@pytest.mark.parametrize("row_of", ["FGSM", "FGSM, least likely class", "BIM", "PGD", "PGD, least likely class"])
def test_linf_results_equal_every_library_except_for_known_rounding(rows, row_of):
    found = [row for row in rows if row.attack == row_of and row.threat.startswith("linf")]
    assert len(found) == 2 * len(INSTALLED)
    for row in found:
        rounded = any(d.rounding for d in DIFFERENCES if (d.library, d.attack) == (row.library, row.attack))
        assert row.verdict in (("equal", "close") if rounded else ("equal",))


def test_l2_results_are_close_or_differ_by_design(rows):
    found = [row for row in rows if row.threat.startswith("l2") and "random" not in row.attack]
    assert {row.attack for row in found if row.library == "foolbox"} == {"FGM", "BIM", "PGD", "PGD at the edge of the box"}
    for row in found:
        assert row.verdict in ("equal", "close", "by design")
        assert (row.verdict == "by design") <= (row.library == "art" and "edge" in row.attack and bool(row.reason))
        assert len(row.differing) <= 0.02 * row.n or row.verdict == "by design"
        assert bool(row.differing) == (row.max_difference > 1e-6)


def test_interior_l2_cases_stay_below_the_margin(rows):
    interior = [row for row in rows if row.attack in ("FGM", "BIM", "PGD") and row.threat.startswith("l2")]
    assert {float(row.threat.split(":")[1]) for row in interior} == {0.25}
    assert MARGIN > 0.25


@pytest.fixture
def compare_one(monkeypatch, trained):
    """Return the row of a single case against foolbox."""

    def run(case, **fields):
        monkeypatch.setattr(module, "cases", lambda threat: [replace(case, threat=threat, **fields)])
        (row,) = crosscheck(*trained, eps=(0.1,), eps_l2=(), libraries=["foolbox"])
        return row

    return run


PGD_CASE = Case("PGD", PGD(random_start=False), Linf(0.1), 40, 2.5 / 40)


def test_a_tiny_difference_in_step_size_is_detected(compare_one):
    assert compare_one(PGD_CASE).verdict == "equal"
    row = compare_one(PGD_CASE, fraction=2.5 / 40 * (1 + 1e-6))
    assert row.verdict == "differs"
    assert not row.ok
    assert 0 < row.max_difference < 1e-5
    assert row.differing


def test_another_targeted_attack_is_detected(compare_one):
    assert compare_one(PGD_CASE, targeted=True).verdict == "equal"
    assert compare_one(PGD_CASE, targeted=True, ours=FGSM()).verdict == "differs"


def test_a_weaker_random_attack_is_detected(compare_one):
    case = Case("PGD, random start", PGD(), Linf(0.1), 40, 2.5 / 40, random_start=True)
    assert compare_one(case).verdict == "same rate"
    row = compare_one(case, ours=PGD(steps=1, reach=0.01))
    assert row.verdict == "differs"
    assert row.p_value < 0.001
    assert row.only_theirs > row.only_ours + 10


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(0, 0), (1, 0), (3, 9), (9, 3), (0, 6), (4, 4)])
def test_the_p_value_is_the_exact_binomial_one(only_ours, only_theirs):
    x, at = torch.zeros(20, 1), torch.arange(20)
    success = [at < only_ours, (at >= 10) & (at < 10 + only_theirs)]
    row = module._row("foolbox", replace(PGD_CASE, random_start=True), x, x, success)
    n, k = only_ours + only_theirs, min(only_ours, only_theirs)
    assert (row.only_ours, row.only_theirs) == (only_ours, only_theirs)
    assert row.p_value == pytest.approx(min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))


def test_one_percent_of_examples_may_differ_in_l2_but_not_in_linf():
    ours, success = torch.zeros(100, 3), [torch.ones(100, dtype=torch.bool)] * 2
    theirs, l2 = ours.clone(), replace(PGD_CASE, threat=module.L2(0.1))
    theirs[5, 1] = 1e-3
    linf_row, l2_row = (module._row("foolbox", case, ours, theirs, success) for case in (PGD_CASE, l2))
    assert (linf_row.verdict, l2_row.verdict) == ("differs", "close")
    assert linf_row.differing == l2_row.differing == (5,)
    failed_on_one = [success[0], torch.arange(100) != 5]
    assert module._row("foolbox", l2, ours, theirs, failed_on_one).verdict == "differs"
    theirs[:3] = 1e-3
    assert module._row("foolbox", l2, ours, theirs, success).verdict == "differs"


def test_success_rates_are_misclassification_rates(rows, trained):
    net, x, y = trained
    expected = FGSM()(net, x, y, threat=Linf(0.2), keep="last").success.double().mean()
    row = next(r for r in rows if (r.library, r.attack, r.threat) == ("foolbox", "FGSM", "linf:0.2"))
    assert row.ours == row.theirs == float(expected)


@pytest.mark.slow
def test_model_random_state_and_inputs_are_restored(trained):
    net, x, y = copy.deepcopy(trained[0]).train(), *trained[1:]
    net[0].eval()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before, state, images = copy.deepcopy(net.state_dict()), random_state(), x.clone()
    crosscheck(net, x, y, eps=(0.1,), eps_l2=(0.1,))
    assert all((p.grad == 0.5).all() and p.requires_grad for p in net.parameters())
    assert [part.training for part in net] == [False] + [True] * 6
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert random_state() == state
    assert torch.equal(x, images)


def test_missing_libraries_are_listed_and_skipped(monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    assert list(library_versions()) == list(LIBRARIES)
    assert {name for name, version in library_versions().items() if version} == {"foolbox"}
    assert {row.library for row in crosscheck(*trained, eps=(0.1,), eps_l2=())} == {"foolbox"}
    with pytest.raises(ArgumentError, match="'art' is not among the installed libraries"):
        crosscheck(*trained, libraries=["foolbox", "art"])


def test_empty_inputs_are_refused(trained):
    net, x, y = trained
    with pytest.raises(ArgumentError, match="x is empty"):
        crosscheck(net, x[:0], y[:0])


def test_known_differences_name_compared_attacks():
    compared = {case.name for threat in (Linf(0.1), module.L2(0.1)) for case in module.cases(threat)}
    assert {d.attack for d in DIFFERENCES} - {""} <= compared
    assert {d.library for d in DIFFERENCES} <= set(LIBRARIES)
    assert not [d for d in DIFFERENCES if d.library == "foolbox" and d.attack]  # no known difference excuses foolbox


@pytest.mark.parametrize("width", [80, 250])
def test_the_table_shows_every_row_and_marks_disagreement(rows, width):
    bad = replace(rows[0], verdict="differs", only_ours=7, threat="linf:9")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table([*rows, bad]))
    text = console.export_text()
    body = text.partition("\n[1]")[0]
    everyone = [*rows, bad]
    for verdict in ("equal", "differs"):
        assert body.count(verdict) == sum(row.verdict == verdict for row in everyone)
    for row in rows:
        assert row.threat in text
        assert row.reason[:20] in text
    assert "…" not in text
    assert f"{len(rows)} of {len(rows) + 1} agree" in text


# AutoAttack

needs_autoattack = pytest.mark.skipif(autoattack.autoattack_version() is None, reason="pyautoattack is not installed")


@pytest.fixture(scope="module")
def from_autoattack(trained):
    """Run AutoAttack on six images, one of them misclassified before."""
    net, x, y = trained
    with torch.no_grad():
        right = net(x).argmax(1) == y
    at = torch.cat([right.nonzero().squeeze(1)[:5], (~right).nonzero().squeeze(1)[:1]])
    return net, x[at], y[at], *autoattack.run_autoattack(net, x[at], y[at], Linf(0.12), seed=1)


@needs_autoattack
def test_autoattack_and_our_attack_are_compared_image_by_image(from_autoattack, monkeypatch):
    net, x, y, x_adv, claimed = from_autoattack
    monkeypatch.setattr(autoattack, "run_autoattack", lambda *args: (x_adv, claimed))
    found = autoattack.compare_with_autoattack(net, x, y, Linf(0.12), ours=FGSM(), seed=1)
    mine = FGSM()(net, x, y, threat=Linf(0.12), seed=1).x_adv
    expected = {"both": [], "ours": [], "theirs": [], "neither": []}
    for i in range(len(x)):
        success = [int(net(images[i : i + 1]).argmax()) != int(y[i]) for images in (mine, x_adv)]
        assert float((x_adv[i] - x[i]).abs().max()) <= 0.12 + 1e-6
        expected[{(1, 1): "both", (1, 0): "ours", (0, 1): "theirs", (0, 0): "neither"}[tuple(map(int, success))]].append(i)
    assert (found.both, found.neither) == (len(expected["both"]), len(expected["neither"]))
    assert (found.only_ours, found.only_theirs) == (tuple(expected["ours"]), tuple(expected["theirs"]))
    assert (found.rejected, found.n, found.threat) == ((), 6, "linf:0.12")
    assert bool(claimed[5])
    assert found.only_theirs  # the test compares something: one step is weaker


def compare_with_fake(monkeypatch, trained, x_adv, claimed):
    """Compare a fake AutoAttack that returns these values with an attack of ours that changes nothing."""
    net, x, y = trained
    monkeypatch.setattr(autoattack, "run_autoattack", lambda *args: (x_adv, torch.tensor(claimed)))
    return autoattack.compare_with_autoattack(net, x, y, Linf(0.05), ours=PGD(steps=1, reach=1e-9, random_start=False))


def test_autoattack_results_are_judged_by_us(monkeypatch, trained):
    net, x, y = trained
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero().squeeze(1)
    x, y = x[right], y[right]
    far = PGD()(net, x, y, threat=Linf(0.6), keep="last")
    good = FGSM()(net, x, y, threat=Linf(0.05)).x_adv
    wrong = (net(good).argmax(1) != y).nonzero().squeeze(1)
    at = torch.cat([far.success.nonzero().squeeze(1)[:3], wrong[:1]])
    x_adv = torch.stack([far.x_adv[at[0]], x[at[1]], torch.full_like(x[0], torch.nan), good[at[3]]])
    found = compare_with_fake(monkeypatch, (net, x[at], y[at]), x_adv, [True, True, True, True])
    assert (found.both, found.only_theirs, found.only_ours, found.neither) == (0, (3,), (), 3)
    assert found.rejected == (0, 1, 2)  # too far, classified correctly, not finite
    low = x[at[:1]].clone()
    low[0, 0, 0, 0] = -1e-3  # slightly outside the box
    found = compare_with_fake(monkeypatch, (Wrong(), x[at[:1]], y[at[:1]]), low, [True])
    assert (found.both, found.only_ours, found.rejected) == (0, (0,), (0,))


class Wrong(torch.nn.Module):
    """Predicts an eleventh class for every input."""

    def forward(self, x):
        return torch.nn.functional.one_hot(torch.full((len(x),), 10), 11).float() + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("threat", "classes", "shape", "word"),
    [
        (Linf(0.1), 3, (1, 1, 4, 4), "at least 4 classes"),
        (Linf(0.1, bounds=(-1.0, 1.0)), 10, (1, 1, 4, 4), "in \\[0, 1\\]"),
        (Linf(0.1, bounds=None), 10, (1, 1, 4, 4), "in \\[0, 1\\]"),
        (Linf(torch.tensor([0.1])), 10, (1, 1, 4, 4), "one eps"),
        (Pixels(1), 10, (1, 1, 4, 4), "not Pixels"),
        (L2(1.0), 10, (1, 16), "N, C, H, W"),
    ],
)
def test_unsupported_requests_to_autoattack_are_refused_before_it_runs(threat, classes, shape, word):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, classes))
    x, y = torch.rand(shape), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=word):
        autoattack.compare_with_autoattack(net, x, y, threat)


def test_autoattack_targets_at_most_the_existing_classes_and_state_is_restored(monkeypatch, trained):
    seen, tracer = {}, sys.gettrace()

    class Fake:
        def __init__(self, model, **options):
            seen.update(options, model=model)
            self.apgd_targeted, self.fab = (SimpleNamespace(n_target_classes=9) for _ in range(2))

        def run_standard_evaluation(self, x, y, batch_size):
            seen.update(targets=(self.apgd_targeted.n_target_classes, self.fab.n_target_classes), batch_size=batch_size)
            torch.manual_seed(0)
            sys.settrace(None)
            seen["model"](x.clone().requires_grad_()).sum().backward()
            x += 7
            return x, y

    monkeypatch.setattr(autoattack, "load_autoattack", lambda: SimpleNamespace(AutoAttack=Fake))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    x, state = trained[1][:4].clone(), random_state()

    def trace(*args):
        return None

    sys.settrace(trace)
    try:
        found = autoattack.compare_with_autoattack(net, x, torch.zeros(4, dtype=torch.int64), L1(2.0), ours=FGSM(), seed=3)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracer)
    assert seen["targets"] == (4, 4)
    assert (seen["norm"], seen["eps"], seen["seed"], seen["version"], seen["batch_size"]) == ("L1", 2.0, 3, "standard", 4)
    assert random_state() == state
    assert torch.equal(x, trained[1][:4])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert found.only_theirs == found.rejected == ()
    assert found.threat == "l1:2"


@pytest.mark.parametrize(
    ("ours", "theirs", "ok"), [(0, 10, True), (0, 12, False), (12, 0, True), (3, 20, False), (9, 14, True)]
)
def test_being_significantly_weaker_than_autoattack_is_not_ok(ours, theirs, ok):
    n = ours + theirs
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(min(ours, theirs) + 1)) / 2**n)
    one = autoattack.AutoAttackComparison("linf:0.1", 50, 0, tuple(range(ours)), tuple(range(20, 20 + theirs)), 0, (), p)
    assert one.ok is ok
    assert ok or p < autoattack.LEVEL


def test_images_that_only_one_attack_solves_are_listed_by_index():
    one = autoattack.AutoAttackComparison("l2:1", 99, 5, (3,), tuple(range(40, 65)), 1, (7, 8), 0.01)
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(autoattack.format_autoattack_comparisons([one]))
    text = console.export_text()
    assert "l2:1, first 99 images: both solve 5, only Standard 1, only AutoAttack 25, neither 1; p = 0.01" in text
    assert "only Standard solves image 3\n" in text
    assert f"only AutoAttack solves images {', '.join(map(str, range(40, 60)))} and 5 more" in text
    assert "AutoAttack reports as solved, but are not: images 7, 8" in text


def test_the_command_reports_why_autoattack_was_not_run(monkeypatch, trained):
    part = SimpleNamespace(x=trained[1], y=trained[2])
    console = Console(width=200, record=True, file=io.StringIO())
    monkeypatch.setattr(command, "autoattack_version", lambda: "0.2.0")
    three = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    assert command._run_autoattack(three, part, 4, console)
    assert "AutoAttack was not run: AutoAttack needs at least 4 classes" in console.export_text()
    monkeypatch.setattr(command, "autoattack_version", lambda: None)
    assert command._run_autoattack(three, part, 4, console)
    assert console.export_text() == ""
