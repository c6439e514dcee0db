"""The cross-check finds agreement where there is one, and every disagreement that is put before it."""

import copy
import io
import math
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from robustkit import FGSM, PGD, Linf, data, zoo
from robustkit._world import random_state
from robustkit.errors import ArgumentError
from robustkit.interop import crosscheck as module
from robustkit.interop._cases import MARGIN, PEERS, Case
from robustkit.interop.crosscheck import DIFFERENCES, crosscheck, peers, table

INSTALLED = [name for name, version in peers().items() if version]


@pytest.fixture(scope="module")
def rows(trained):
    return crosscheck(*trained, eps=(8 / 255, 0.2), eps_l2=(0.25, 1.0))


def test_foolbox_is_compared_here():
    assert "foolbox" in INSTALLED


def test_every_installed_library_agrees_on_a_trained_network(rows):
    assert {row.library for row in rows} == set(INSTALLED)
    assert [row for row in rows if not row.ok] == []


@pytest.mark.parametrize("name", zoo.names())
def test_foolbox_agrees_on_the_shipped_models(name):
    """256 real images: Linf bit for bit, L2 within a millionth on 99 %, random starts at the same rate."""
    part = data.load(zoo.card(name).scores.data).part(limit=256)
    rows = crosscheck(zoo.load(name), part.x, part.y, eps=(1 / 255, 8 / 255, 0.1, 0.3), eps_l2=(0.25,), libraries=["foolbox"])
    random = [row for row in rows if "random" in row.attack]
    linf = [row for row in rows if row.threat.startswith("linf") and row not in random]
    assert [(row.verdict, row.largest, row.n) for row in linf] == [("equal", 0.0, 256)] * 4 * 5
    l2 = [row for row in rows if row.threat.startswith("l2") and row not in random]
    assert len(l2) == 4
    assert all(row.verdict in ("equal", "close") and len(row.differing) <= 2 for row in l2)
    assert len(random) == 5
    assert all(row.verdict == "same rate" for row in random)
    assert any(0.05 < row.ours < 0.95 for row in rows)  # not all of them trivial


@pytest.mark.parametrize("row_of", ["FGSM", "FGSM, least likely class", "BIM", "PGD", "PGD, least likely class"])
def test_linf_equals_every_library_but_for_known_roundings(rows, row_of):
    found = [row for row in rows if row.attack == row_of and row.threat.startswith("linf")]
    assert len(found) == 2 * len(INSTALLED)
    for row in found:
        rounded = any(d.rounding for d in DIFFERENCES if (d.library, d.attack) == (row.library, row.attack))
        assert row.verdict in (("equal", "close") if rounded else ("equal",))


def test_l2_is_close_and_what_is_not_is_listed(rows):
    found = [row for row in rows if row.threat.startswith("l2") and "random" not in row.attack]
    assert {row.attack for row in found if row.library == "foolbox"} == {"FGM", "BIM", "PGD", "PGD at the edge of the box"}
    for row in found:
        assert row.verdict in ("equal", "close", "by design")
        assert (row.verdict == "by design") <= (row.library == "art" and "edge" in row.attack and bool(row.reason))
        assert len(row.differing) <= 0.02 * row.n or row.verdict == "by design"
        assert bool(row.differing) == (row.largest > 1e-6)


def test_no_l2_change_below_the_margin_reaches_the_edge(rows):
    interior = [row for row in rows if row.attack in ("FGM", "BIM", "PGD") and row.threat.startswith("l2")]
    assert {float(row.threat.split(":")[1]) for row in interior} == {0.25}
    assert MARGIN > 0.25


@pytest.fixture
def only(monkeypatch, trained):
    """The one row that a single case gives against foolbox."""

    def run(case, **fields):
        monkeypatch.setattr(module, "cases", lambda threat: [replace(case, threat=threat, **fields)])
        (row,) = crosscheck(*trained, eps=(0.1,), eps_l2=(), libraries=["foolbox"])
        return row

    return run


PGD_CASE = Case("PGD", PGD(random_start=False), Linf(0.1), 40, 2.5 / 40)


def test_the_smallest_change_of_a_step_is_found(only):
    assert only(PGD_CASE).verdict == "equal"
    row = only(PGD_CASE, fraction=2.5 / 40 * (1 + 1e-6))
    assert row.verdict == "differs"
    assert not row.ok
    assert 0 < row.largest < 1e-5
    assert row.differing


def test_another_attack_on_a_wanted_class_is_found(only):
    assert only(PGD_CASE, targeted=True).verdict == "equal"
    assert only(PGD_CASE, targeted=True, ours=FGSM()).verdict == "differs"


def test_a_weaker_random_attack_is_found(only):
    case = Case("PGD, random start", PGD(), Linf(0.1), 40, 2.5 / 40, random_start=True)
    assert only(case).verdict == "same rate"
    row = only(case, ours=PGD(steps=1, reach=0.01))
    assert row.verdict == "differs"
    assert row.p_value < 0.001
    assert row.only_theirs > row.only_ours + 10


@pytest.mark.parametrize(("won_by_us", "won_by_them"), [(0, 0), (1, 0), (3, 9), (9, 3), (0, 6), (4, 4)])
def test_the_p_value_is_that_of_a_fair_coin(won_by_us, won_by_them):
    x, at = torch.zeros(20, 1), torch.arange(20)
    won = [at < won_by_us, (at >= 10) & (at < 10 + won_by_them)]
    row = module._row("foolbox", replace(PGD_CASE, random_start=True), x, x, won)
    n, k = won_by_us + won_by_them, min(won_by_us, won_by_them)
    assert (row.only_ours, row.only_theirs) == (won_by_us, won_by_them)
    assert row.p_value == pytest.approx(min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n))


def test_one_example_in_a_hundred_may_part_in_l2_but_not_in_linf():
    ours, won = torch.zeros(100, 3), [torch.ones(100, dtype=torch.bool)] * 2
    theirs, l2 = ours.clone(), replace(PGD_CASE, threat=module.L2(0.1))
    theirs[5, 1] = 1e-3
    linf_row, l2_row = (module._row("foolbox", case, ours, theirs, won) for case in (PGD_CASE, l2))
    assert (linf_row.verdict, l2_row.verdict) == ("differs", "close")
    assert linf_row.differing == l2_row.differing == (5,)
    lost = [won[0], torch.arange(100) != 5]
    assert module._row("foolbox", l2, ours, theirs, lost).verdict == "differs"
    theirs[:3] = 1e-3
    assert module._row("foolbox", l2, ours, theirs, won).verdict == "differs"


def test_the_rates_are_the_shares_of_wrong_answers(rows, trained):
    net, x, y = trained
    expected = FGSM()(net, x, y, threat=Linf(0.2), keep="last").success.double().mean()
    row = next(r for r in rows if (r.library, r.attack, r.threat) == ("foolbox", "FGSM", "linf:0.2"))
    assert row.ours == row.theirs == float(expected)


def test_the_world_is_left_as_found(trained):
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


def test_absent_libraries_are_listed_and_passed_over(monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    monkeypatch.setitem(sys.modules, "art.attacks.evasion", None)
    assert list(peers()) == list(PEERS)
    assert {name for name, version in peers().items() if version} == {"foolbox"}
    assert {row.library for row in crosscheck(*trained, eps=(0.1,), eps_l2=())} == {"foolbox"}
    with pytest.raises(ArgumentError, match="'art' is not among those installed"):
        crosscheck(*trained, libraries=["foolbox", "art"])


def test_nothing_to_compare_is_refused(trained):
    net, x, y = trained
    with pytest.raises(ArgumentError, match="x is empty"):
        crosscheck(net, x[:0], y[:0])


def test_known_differences_name_what_is_compared():
    compared = {case.name for threat in (Linf(0.1), module.L2(0.1)) for case in module.cases(threat)}
    assert {d.attack for d in DIFFERENCES} - {""} <= compared
    assert {d.library for d in DIFFERENCES} <= set(PEERS)
    assert not [d for d in DIFFERENCES if d.library == "foolbox" and d.attack]  # foolbox gets no excuse


@pytest.mark.parametrize("width", [80, 250])
def test_the_table_shows_every_row_and_marks_the_bad_ones(rows, width):
    bad = replace(rows[0], verdict="differs", only_ours=7, threat="linf:9")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table([*rows, bad]))
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
