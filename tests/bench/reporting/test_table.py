"""The table on the terminal: figures are not cut in 80 columns, flags stand out, names are verbatim."""

import io
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from rich.console import Console

from robustkit.bench import Case
from robustkit.bench.reporting.live import Live, duration
from robustkit.bench.reporting.table import table

RECORD = {
    "model": "zoo:mnist-cnn",
    "data": "mnist-5k",
    "defence": None,
    "goal": "misclassify",
    "threat": "linf:0.3",
    "attack": "pgd",
    "seed": 0,
    "n": 1000,
    "clean_accuracy": 0.981,
    "robust_accuracy": 0.1234,
    "success_rate": 0.8766,
    "low": 0.0711,
    "high": 0.2022,
    "median_size": 0.3,
    "forwards": 41_500,
    "backwards": 40_000,
    "seconds": 12.34,
    "access": "white",
    "flags": [],
    "notes": [],
}
WIDEST = {
    "attack": "pgd:steps=1000,reach=2.5,step_size=0.00392156862745098,random_start=false",
    "threat": "linf:0.03137254901960784",
    "goal": "classify-as:999999999",
    "robust_accuracy": 1.0,
    "low": 1.0,
    "high": 1.0,
    "success_rate": 1.0,
    "forwards": 12_345_678,
    "backwards": 0,
    "seconds": 123_456.7,
    "flags": [{"name": "a-flag", "why": "do not believe it " * 20}],
}


def shown(*records, width=80, color=False):
    file = io.StringIO()
    screen = Console(width=width, file=file, force_terminal=color, color_system="standard" if color else None)
    screen.print(table(records))
    return file.getvalue()


def rows(text):
    return [line for line in text.splitlines() if " % interval" not in line and "–" in line]


@pytest.mark.parametrize("record", [RECORD, RECORD | WIDEST])
def test_the_table_fits_80_columns_without_cutting_a_figure(record):
    text = shown(record, record)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    figures = [
        f"{record['robust_accuracy']:.1%}",
        f"{record['low']:.1%} – {record['high']:.1%}",
        f"{record['success_rate']:.1%}",
        f"{(record['forwards'] + record['backwards']) / 1000:,.1f}",
        f"{record['seconds']:,.1f}",
    ]
    assert len(rows(text)) == 2
    for row in rows(text):
        for figure in figures:
            assert f" {figure} " in f" {row.strip()} "
    for heading in ("threat", "attack", "robust", "95 % interval", "success", "cost", "seconds"):
        assert heading in text
    packed = "".join(text.split())
    if record is RECORD:
        assert "zoo:mnist-cnn: 98.1% correct of 1,000 images of mnist-5k" in text
        assert rows(text)[0].split() == ["linf:0.3", "pgd", "12.3%", "7.1%", "–", "20.2%", "87.7%", "81.5", "12.3"]
    else:
        assert packed.count("!a-flag") == 1
        assert ("donotbelieveit" * 20) in packed


def test_a_long_name_is_wrapped_and_not_cut():
    lines = shown(RECORD | WIDEST).splitlines()
    first = next(i for i, line in enumerate(lines) if "threat" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("!"))
    starts = [lines[first].index(name) for name in ("threat", "attack", "robust")]
    columns = [slice(start, end) for start, end in itertools.pairwise(starts)]
    columns_text = ["".join(line[column].strip() for line in lines[first + 2 : end]) for column in columns]
    assert columns_text[0] == WIDEST["threat"]
    assert columns_text[1].replace(" ", "") == f"{WIDEST['attack']}→{WIDEST['goal']}!"


@pytest.mark.parametrize("name", ["net[0].py:[bold]x[/bold]", "a:smile:b", "[/]", "back\\slash\\", "[link=file:x]y"])
def test_names_are_printed_verbatim(name):
    record = RECORD | dict.fromkeys(("model", "data", "threat", "attack", "goal"), name)
    record |= {"flags": [{"name": name, "why": name}], "notes": [{"name": f"note {name}", "why": name}]}
    text = shown(record, width=250)
    assert f"{name}: 98.1% correct of 1,000 images of {name}" in text
    assert f"! {name} ({name} → {name}, {name}): {name}" in text
    assert f"note {name} ({name} → {name}, {name}): {name}" in text
    assert f"{name} → {name} !" in text


@dataclass
class FakeRun:
    """The part of a loaded run that the bar uses: its cases, each of 200 images."""

    cases: list

    def images(self, case):
        return range(200)


def bar_output(file, steps, *, terminal=True):
    """The output of a bar over two cases after some blocks (case, seconds, was_stored)."""
    name = "net[0].py:[bold]x[/bold] :smile:"
    loaded = FakeRun([SimpleNamespace(case=Case(name, "linf:1", attack)) for attack in ("fgsm", "pgd")])
    screen = Console(width=200, file=file, force_terminal=terminal, color_system=None)
    with Live(screen, loaded, 1) as live:
        for case, seconds, was_stored in steps:
            live.progress(SimpleNamespace(task=SimpleNamespace(case=case), labels=range(100), seconds=seconds), was_stored)
    return file.getvalue()


def test_the_bar_prints_names_verbatim():
    assert "pgd linf:1 net[0].py:[bold]x[/bold] :smile:" in bar_output(io.StringIO(), [(0, 1, False), (1, 1, False)])


def test_the_bar_prints_nothing_without_a_terminal():
    assert bar_output(io.StringIO(), [(0, 1, False)], terminal=False) == ""


def test_the_bar_shows_images_and_time_left_by_the_cost_of_each_case():
    assert "100/400" in bar_output(io.StringIO(), [(0, 1, False)])
    assert "-:-- left" in bar_output(io.StringIO(), [(0, 1, False)])  # the cost of the second case is not known yet
    text = bar_output(io.StringIO(), [(0, 1, False), (1, 3600, True)])
    assert "200/400" in text
    assert "1:00:01 left" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations_are_formatted_like_a_clock(seconds, text):
    assert duration(seconds) == text


def test_names_of_usual_length_are_not_wrapped_in_80_columns():
    usual = RECORD | {"threat": "linf:16/255", "attack": "pgd:steps=100"}
    text = shown(usual, usual | {"attack": "onepixel"})
    assert " linf:16/255 " in text
    assert " pgd:steps=100 " in text


def test_the_worst_case_is_the_last_row_of_each_threat():
    records = [RECORD | {"threat": threat, "attack": attack} for threat in ("linf:1", "l2:1") for attack in ("fgsm", "pgd")]
    unions = [records[0] | {"threat": threat, "attacks": ["fgsm", "pgd"]} for threat in ("linf:1", "l2:1")]
    file = io.StringIO()
    Console(width=80, file=file).print(table(records, unions))
    first_cells = [line.split()[:2] for line in rows(file.getvalue())]
    assert first_cells == [[t, a] for t in ("linf:1", "l2:1") for a in ("fgsm", "pgd", "worst")]


def test_flags_are_bold_red_and_explained_once():
    flags = [{"name": "masked", "why": "for this reason"}]
    notes = [{"name": "fact", "why": "as it is"}]
    flagged, noted = RECORD | {"flags": flags, "attack": "apgd"}, RECORD | {"notes": notes}
    plain, colored = shown(flagged, noted, flagged), shown(flagged, noted, flagged, color=True)
    assert [" !" in row for row in rows(plain)] == [True, False, True]
    assert plain.count("! masked (apgd, linf:0.3): for this reason") == 1
    assert plain.count("fact (pgd, linf:0.3): as it is") == 1
    assert "! fact" not in plain
    assert "\x1b[1;31m! masked" in colored  # bold and red
    assert colored.count("\x1b[1;31m !") == 2


def test_each_model_has_a_table_with_untargeted_attacks_first():
    other = RECORD | {"goal": "least-likely", "success_rate": 0.111}
    text = shown(other, RECORD, RECORD | {"model": "second"}, width=120)
    assert [line.split(":")[0] for line in text.splitlines() if "correct of" in line] == ["zoo", "second"]
    assert ["→ least-likely" in row for row in rows(text)] == [False, True, False]
    packed = " ".join(text.split())
    assert (
        packed.count("95 % interval (Wilson) over the choice of images; the rate itself is an upper bound on robustness") == 1
    )


def test_robust_accuracy_or_success_rate_is_bold_by_goal():
    untargeted, targeted = rows(shown(RECORD, RECORD | {"goal": "least-likely"}, width=120, color=True))
    assert "\x1b[1m 12.3%" in untargeted
    assert "\x1b[2m  87.7%" in untargeted
    assert "\x1b[2m 12.3%" in targeted
    assert "\x1b[1m  87.7%" in targeted
