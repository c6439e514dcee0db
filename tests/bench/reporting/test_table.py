"""The table on the terminal: every figure whole in 80 columns, alarms loud, names as they are."""

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
    "flags": [{"name": "an-alarm", "why": "do not believe it " * 20}],
}


def shown(*records, width=80, color=False):
    file = io.StringIO()
    screen = Console(width=width, file=file, force_terminal=color, color_system="standard" if color else None)
    screen.print(table(records))
    return file.getvalue()


def rows(text):
    return [line for line in text.splitlines() if " % interval" not in line and "–" in line]


@pytest.mark.parametrize("record", [RECORD, RECORD | WIDEST])
def test_it_fits_80_columns_with_every_figure_whole(record):
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
        assert packed.count("!an-alarm") == 1
        assert ("donotbelieveit" * 20) in packed


def test_a_long_name_is_folded_and_not_cut():
    lines = shown(RECORD | WIDEST).splitlines()
    first = next(i for i, line in enumerate(lines) if "threat" in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("!"))
    starts = [lines[first].index(name) for name in ("threat", "attack", "robust")]
    columns = [slice(start, end) for start, end in itertools.pairwise(starts)]
    spoken = ["".join(line[column].strip() for line in lines[first + 2 : end]) for column in columns]
    assert spoken[0] == WIDEST["threat"]
    assert spoken[1].replace(" ", "") == f"{WIDEST['attack']}→{WIDEST['goal']}!"


@pytest.mark.parametrize("name", ["net[0].py:[bold]x[/bold]", "a:smile:b", "[/]", "back\\slash\\", "[link=file:x]y"])
def test_names_are_shown_as_they_are(name):
    record = RECORD | dict.fromkeys(("model", "data", "threat", "attack", "goal"), name)
    record |= {"flags": [{"name": name, "why": name}], "notes": [{"name": f"note {name}", "why": name}]}
    text = shown(record, width=250)
    assert f"{name}: 98.1% correct of 1,000 images of {name}" in text
    assert f"! {name} ({name} → {name}, {name}): {name}" in text
    assert f"note {name} ({name} → {name}, {name}): {name}" in text
    assert f"{name} → {name} !" in text


@dataclass
class Loading:
    """What the bar needs to know of a run: its cases, each of 200 images."""

    cases: list

    def images(self, case):
        return range(200)


def moved(file, steps, *, terminal=True):
    """A bar over two cases that has seen some blocks (case, seconds, found)."""
    name = "net[0].py:[bold]x[/bold] :smile:"
    loaded = Loading([SimpleNamespace(case=Case(name, "linf:1", attack)) for attack in ("fgsm", "pgd")])
    screen = Console(width=200, file=file, force_terminal=terminal, color_system=None)
    with Live(screen, loaded, 1) as live:
        for case, seconds, found in steps:
            live.progress(SimpleNamespace(task=SimpleNamespace(case=case), labels=range(100), seconds=seconds), found)
    return file.getvalue()


def test_a_bar_shows_names_as_they_are():
    assert "pgd linf:1 net[0].py:[bold]x[/bold] :smile:" in moved(io.StringIO(), [(0, 1, False), (1, 1, False)])


def test_a_bar_is_silent_where_there_is_no_terminal():
    assert moved(io.StringIO(), [(0, 1, False)], terminal=False) == ""


def test_a_bar_counts_images_and_the_time_that_the_costs_of_the_cases_make():
    assert "100/400" in moved(io.StringIO(), [(0, 1, False)])
    assert "-:-- left" in moved(io.StringIO(), [(0, 1, False)])  # nothing is known of the second case
    text = moved(io.StringIO(), [(0, 1, False), (1, 3600, True)])
    assert "200/400" in text
    assert "1:00:01 left" in text


@pytest.mark.parametrize(
    ("seconds", "told"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations_read_like_a_clock(seconds, told):
    assert duration(seconds) == told


def test_usual_names_are_whole_in_80_columns():
    usual = RECORD | {"threat": "linf:16/255", "attack": "pgd:steps=100"}
    text = shown(usual, usual | {"attack": "onepixel"})
    assert " linf:16/255 " in text
    assert " pgd:steps=100 " in text


def test_what_survives_all_attacks_stands_below_them_threat_by_threat():
    records = [RECORD | {"threat": threat, "attack": attack} for threat in ("linf:1", "l2:1") for attack in ("fgsm", "pgd")]
    both = [records[0] | {"threat": threat, "attacks": ["fgsm", "pgd"]} for threat in ("linf:1", "l2:1")]
    file = io.StringIO()
    Console(width=80, file=file).print(table(records, both))
    told = [line.split()[:2] for line in rows(file.getvalue())]
    assert told == [[t, a] for t in ("linf:1", "l2:1") for a in ("fgsm", "pgd", "worst")]


def test_flags_are_loud_and_told_once():
    flags = [{"name": "masked", "why": "for this reason"}]
    notes = [{"name": "fact", "why": "as it is"}]
    loud, calm = RECORD | {"flags": flags, "attack": "apgd"}, RECORD | {"notes": notes}
    plain, colored = shown(loud, calm, loud), shown(loud, calm, loud, color=True)
    assert [" !" in row for row in rows(plain)] == [True, False, True]
    assert plain.count("! masked (apgd, linf:0.3): for this reason") == 1
    assert plain.count("fact (pgd, linf:0.3): as it is") == 1
    assert "! fact" not in plain
    assert "\x1b[1;31m! masked" in colored  # bold and red
    assert colored.count("\x1b[1;31m !") == 2


def test_each_model_has_a_table_and_goals_of_being_wrong_come_first():
    other = RECORD | {"goal": "least-likely", "success_rate": 0.111}
    text = shown(other, RECORD, RECORD | {"model": "second"}, width=120)
    assert [line.split(":")[0] for line in text.splitlines() if "correct of" in line] == ["zoo", "second"]
    assert ["→ least-likely" in row for row in rows(text)] == [False, True, False]
    packed = " ".join(text.split())
    assert (
        packed.count("95 % interval (Wilson) over the choice of images; the rate itself is an upper bound on robustness") == 1
    )


def test_the_figure_that_counts_is_bold():
    wrong, targeted = rows(shown(RECORD, RECORD | {"goal": "least-likely"}, width=120, color=True))
    assert "\x1b[1m 12.3%" in wrong
    assert "\x1b[2m  87.7%" in wrong
    assert "\x1b[2m 12.3%" in targeted
    assert "\x1b[1m  87.7%" in targeted
