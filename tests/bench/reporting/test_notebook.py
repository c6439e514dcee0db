"""The fragment for notebooks: the figures of the page, and no effect on the rest of the notebook."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkit.bench.reporting.notebook import fragment

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}</style>"""
VOID = {"br", "hr", "img", "input", "link", "meta"}


def record(**changes):
    return {
        "model": "m",
        "data": "digits",
        "defence": None,
        "goal": "misclassify",
        "threat": "linf:0.3",
        "attack": "pgd",
        "seed": 0,
        "n": 100,
        "clean_accuracy": 0.97,
        "robust_accuracy": 0.123,
        "success_rate": 0.877,
        "low": 0.07,
        "high": 0.2,
        "median_size": 0.3,
        "forwards": 4100,
        "backwards": 4000,
        "seconds": 1.5,
        "access": "white",
        "flags": [],
        "notes": [],
    } | changes


def fragment_of(records, worst_case=()):
    return fragment({"robustkit": "0.1.0", "schema": 1, "environment": {}, "records": records, "worst_case": list(worst_case)})


class Tree(HTMLParser):
    """Tags, attributes and text, and the table rows as lists of cells; fails on tags that are not nested properly."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.pieces, self.rows, self.open_tags = [], [], [], []
        self.feed(html)
        assert not self.open_tags

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open_tags:
            self.pieces.append(data)
        if {"td", "th"} & set(self.open_tags):
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())


def percent(share):
    return f"{100 * share:.1f} %"


@st.composite
def records(draw):
    def one(number):
        robust = draw(st.integers(0, 20)) / 20  # coarse, so that rows tie
        return record(
            model=draw(st.sampled_from(["m1", "m2"])),
            threat=draw(st.sampled_from(["linf:0.3", "l2:2"])),
            goal=draw(st.sampled_from(["misclassify", "misclassify", "least-likely"])),
            attack=f"attack-{number}",
            robust_accuracy=robust,
            clean_accuracy=draw(st.floats(robust, 1)),
            success_rate=draw(st.floats(0, 1)),
            low=draw(st.floats(0, robust)),
            high=draw(st.floats(robust, 1)),
            forwards=draw(st.integers(0, 9900)),
        )

    return [one(number) for number in range(draw(st.integers(1, 7)))]


@settings(deadline=None, max_examples=60)
@given(records())
def test_every_record_is_one_row_with_its_figures(drawn):
    shown = fragment_of(drawn)
    head, *rows = Tree(shown).rows
    assert head == ["Model", "Threat", "Attack", "Goal", "Clean", "Robust", "95 % interval", "Success", "Cost per image"]
    expected = {}
    for row in drawn:
        plain = row["goal"] == "misclassify"
        robust = percent(row["robust_accuracy"])
        cost = (row["forwards"] + row["backwards"]) / 100
        expected[row["attack"]] = [
            row["model"],
            row["threat"],
            row["attack"],
            row["goal"],
            percent(row["clean_accuracy"]),
            robust if plain else f"({robust})",
            f"{percent(row['low'])} to {percent(row['high'])}" if plain else "",
            percent(row["success_rate"]),
            f"{cost:.1f}".removesuffix(".0") if cost < 100 else f"{cost:.0f}",
        ]
    assert len(rows) == len(expected)
    assert {row[2]: row for row in rows} == expected
    assert ("In brackets" in shown) is any(row["goal"] != "misclassify" for row in drawn)


@settings(deadline=None, max_examples=60)
@given(records())
def test_the_lowest_of_each_model_and_threat_is_bold_if_others_are_higher(drawn):
    marked = re.findall(r"<tr>(?:(?!</tr>).)*?<bdi>(attack-\d)</bdi>(?:(?!</tr>).)*?robustkit-lowest", fragment_of(drawn))
    shares_of = defaultdict(set)
    for row in drawn:
        if row["goal"] == "misclassify":
            shares_of[row["model"], row["threat"]].add(row["robust_accuracy"])
    lowest = [
        row["attack"]
        for row in drawn
        for shares in [shares_of[row["model"], row["threat"]]]
        if row["goal"] == "misclassify" and row["robust_accuracy"] == min(shares) < max(shares)
    ]
    assert sorted(marked) == sorted(lowest)


def test_the_first_lines_are_the_worst_case_over_attacks():
    union = {key: record()[key] for key in ("model", "data", "defence", "threat", "n", "clean_accuracy", "low", "high")}
    union |= {"robust_accuracy": 0.11, "attacks": ["pgd (misclassify)", "fgsm (misclassify)"]}
    rows = [record(), record(attack="fgsm", robust_accuracy=0.5), record(threat="l2:2", goal="least-likely")]
    text = Tree(fragment_of(rows, [union])).text
    assert text.startswith("m: 97.0 % clean, 11.0 % under linf:0.3, not measured under l2:2 (only attacks with another goal)")
    assert "(100 images of digits)" in text
    assert "m: 97.0 % clean, 12.3 % under linf:0.3," in Tree(fragment_of(rows)).text
    assert "upper bound" in text
    assert Tree(fragment_of([])).text == "Nothing was measured."


def test_each_flag_is_explained_once_and_marked_in_the_summary_and_its_rows():
    flag = {"name": "flat-gradients", "why": "nothing to climb"}
    tree = Tree(fragment_of([record(flags=[flag]), record(attack="fgsm", flags=[flag]), record(attack="square")]))
    assert tree.text.count("nothing to climb") == 1
    assert "under linf:0.3 ⚑ flagged" in tree.text
    assert [row[2] for row in tree.rows[1:]] == ["pgd ⚑", "fgsm ⚑", "square"]
    assert "⚑" not in fragment_of([record()])


def test_seeds_and_defences_are_shown_where_there_are_any():
    tree = Tree(fragment_of([record(defence="jpeg"), record(defence="jpeg", seed=1)]))
    assert [row[0] for row in tree.rows[1:]] == ["m behind jpeg"] * 2
    assert {row[2] for row in tree.rows[1:]} == {"pgd, seed 0", "pgd, seed 1"}
    assert "seed" not in fragment_of([record()])


@pytest.mark.parametrize("name", [HOSTILE, "\u202egnp.exe", "\"'", "a/very/long/path" * 13, "bad\udcff.py"], ids=ascii)
def test_hostile_names_are_escaped(name):
    row = record(model=name, attack=name, data=name, defence=name, threat=name, flags=[{"name": name, "why": name}])
    shown = fragment_of([row, row | {"goal": name}])
    tree = Tree(shown)
    harmless = Tree(fragment_of([record(defence="d", flags=[{"name": "n", "why": "w"}]), record(defence="d", goal="g")]))
    assert [tag for tag, _ in tree.tags if tag != "div"] != []
    assert {tag for tag, _ in tree.tags} == {tag for tag, _ in harmless.tags}
    assert not [attribute for _, attrs in tree.tags for attribute in attrs if attribute not in ("class", "scope")]
    written = name.encode("utf-8", "backslashreplace").decode("utf-8")
    assert tree.text.count(" ".join(written.split())) >= 10
    assert shown.encode("utf-8")
    for around in re.findall(r"(.{5})" + re.escape(written.replace("&", "&amp;").replace("<", "&lt;")), shown, re.S):
        assert around == "<bdi>"  # direction marks in a name do not affect the text around it


def test_the_fragment_styles_only_itself_and_loads_nothing():
    shown = fragment_of([record(flags=[{"name": "n", "why": "w"}]), record(goal="g")])
    styles = re.findall(r"<style>(.*?)</style>", shown, re.S)
    assert len(styles) == 1
    for selectors in re.findall(r"([^{}]+)\{", styles[0]):
        assert all(one.strip().startswith(".robustkit-run") for one in selectors.split(","))
    tree = Tree(shown)
    assert tree.tags[0] == ("div", {"class": "robustkit-run"})
    for _, attrs in tree.tags:
        assert "id" not in attrs  # a run may be shown in several cells
        assert all(one.startswith("robustkit-") for one in (attrs.get("class") or "").split())
    assert not {tag for tag, _ in tree.tags} & {"script", "link", "img", "iframe", "html", "body", "head"}
    assert not re.search(r"url\(|@import|https?:|!important", shown)


def test_colours_are_inherited_from_the_notebook():
    """Text inherits its colour and backgrounds are translucent, so light and dark notebooks are readable."""
    style = re.findall(r"<style>(.*?)</style>", fragment_of([record()]), re.S)[0]
    assert set(re.findall(r"[^-]color: ([^;]+);", style)) == {"inherit"}
    assert all(float(alpha) <= 0.2 for alpha in re.findall(r"background: rgba\([^)]*, ([.\d]+)\)", style))
    assert len(re.findall("background", style)) == len(re.findall("background: rgba", style)) == 1


def test_rendering_is_deterministic_and_keeps_its_arguments():
    rows = [record(), record(attack="b", robust_accuracy=0.0)]
    before = copy.deepcopy(rows)
    assert fragment_of(rows) == fragment_of(rows)
    assert rows == before
