"""The curves, read back from the page: every point is at its measured eps and share."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from fractions import Fraction
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustkit.bench.reporting.chart import Line, Point
from robustkit.bench.reporting.eps_charts import families
from robustkit.bench.reporting.page import report

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}"""
TURNED = "\u202egnp.exe\u2066\u200f\x07"
LONG = "a/very/long/path" * 13
NORMS = {"linf": "eps (linf)", "l2": "eps (l2)", "l1": "eps (l1)", "pixels": "number of pixels"}


def record(threat="linf:0.1", robust=0.5, **changes):
    return {
        "model": "m",
        "data": "digits",
        "defence": None,
        "goal": "misclassify",
        "threat": threat,
        "attack": "pgd",
        "seed": 0,
        "n": 100,
        "clean_accuracy": 0.97,
        "robust_accuracy": robust,
        "success_rate": 1 - robust,
        "low": robust / 2,
        "high": (1 + robust) / 2,
        "median_size": 0.3,
        "forwards": 4100,
        "backwards": 4000,
        "seconds": 1.5,
        "access": "white",
        "flags": [],
        "notes": [],
    } | changes


def worst_case(threat, robust, **changes):
    keys = ("model", "data", "defence", "threat", "n", "clean_accuracy", "robust_accuracy", "low", "high")
    row = record(threat, robust, **changes)
    return {key: row[key] for key in keys} | {"attacks": ["pgd (misclassify)"]}


def results_of(records, combined=()):
    return {"robustkit": "0.1.0", "schema": 1, "environment": {}, "records": records, "worst_case": list(combined)}


def page_of(records, combined=()):
    return report(results_of(records, combined), [], command="robustkit bench")


class Drawn:
    """A chart read back from the page: its lines as (eps, share) pairs, by their full names."""

    def __init__(self, figure):
        self.caption = text_of(figure.split("<figcaption>")[1].split("</figcaption>")[0])
        self.notes = text_of(figure.split("</svg>")[1])
        self.svg = ET.fromstring(figure[figure.index('<svg class="curve"') : figure.index("</svg>") + 6])
        self.width, self.height = (float(part) for part in self.svg.get("viewBox").split()[2:])
        heights = {text.text.split()[0]: float(text.get("y")) for text in self.classed("text", "vertical")}
        self.zero, self.one = heights["0"], heights["100"]
        ticks = [text for text in self.classed("text", "horizontal") if "title" not in text.get("class")]
        self.ticks = {text.text: float(text.get("x")) for text in ticks}
        self.lines, self.hollow, self.main, self.labels = {}, {}, set(), []
        for group in self.svg.iter("g"):
            kind = group.get("class").split()[0]
            for point in group.iter("path"):
                if "point" in point.get("class").split():
                    name = point.find("title").text.rpartition(" at eps ")[0]
                    x, y = (float(part) for part in re.findall(r"translate\((\S+) (\S+)\)", point.get("transform"))[0])
                    self.lines.setdefault(name, []).append((self.eps(x), (self.zero - y) / (self.zero - self.one)))
                    self.hollow.setdefault(name, []).append("hollow" in point.get("class").split())
                    if kind == "main":
                        self.main.add(name)
            self.labels += [
                (text.text, float(text.get("x")), float(text.get("y")))
                for text in group.iter("text")
                if text.get("class") == "label"
            ]

    def classed(self, tag, kind):
        return [node for node in self.svg.iter(tag) if kind in node.get("class", "").split()]

    def eps(self, x):
        (last,) = [text for text, place in self.ticks.items() if place == max(self.ticks.values())]
        return (x - self.ticks["0"]) / (self.ticks[last] - self.ticks["0"]) * float(Fraction(last))


class Text(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.pieces = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, data):
        self.pieces.append(data)


def text_of(html):
    return " ".join("".join(Text(html).pieces).split())


def section(page):
    return page.split('<section id="curves">')[1].split("</section>")[0] if '<section id="curves">' in page else ""


def drawn(page):
    return [Drawn(figure) for figure in section(page).split("<figure>")[1:]]


def near(points):
    return [pytest.approx(pair, abs=1e-3) for pair in points]


EPS = {
    "linf": ["1/255", "2/255", "8/255", "0.1", "0.25", "0.300"],
    "l2": ["0.5", "1", "2.0", "3/2"],
    "pixels": ["1", "3", "20"],
}


@st.composite
def runs(draw):
    """Records of up to three models at several eps and attacks, and the worst case over attacks."""
    records, combined = [], []
    names = draw(st.lists(st.sampled_from(["zoo:a", "zoo:b", "net.py:make"]), min_size=1, max_size=3, unique=True))
    for model in names:
        norm = draw(st.sampled_from(sorted(EPS)))
        for eps in draw(st.lists(st.sampled_from(EPS[norm]), min_size=1, max_size=4, unique=True)):
            threat = f"{norm}:{eps}"
            attacks = draw(st.lists(st.sampled_from(["fgsm", "pgd", "square"]), min_size=1, max_size=3, unique=True))
            shares = [draw(st.integers(0, 97)) / 100 for _ in attacks]
            records += [
                record(threat, share, model=model, attack=attack) for attack, share in zip(attacks, shares, strict=True)
            ]
            combined.append(worst_case(threat, draw(st.integers(0, round(100 * min(shares)))) / 100, model=model))
    return records, combined


def value(row):
    return float(Fraction(row["threat"].split(":")[1]))


@settings(deadline=None, max_examples=80)
@given(runs())
def test_exactly_the_measured_points_are_drawn_at_their_positions(run):
    records, combined = run
    expected = []
    for norm in dict.fromkeys(row["threat"].split(":")[0] for row in records):
        rows = [row for row in records if row["threat"].startswith(norm + ":")]
        figures = {row["model"]: [] for row in rows}
        for row in combined:
            if row["model"] in figures and row["threat"].startswith(norm + ":"):
                figures[row["model"]].append((value(row), row["robust_accuracy"]))
        figures = {model: [(0, 0.97), *sorted(points)] for model, points in figures.items() if len(points) > 1}
        if len(figures) > 1:
            expected.append(("All models, worst case over attacks", figures))
        for model, points in figures.items():
            of_model = [row for row in rows if row["model"] == model]
            attacks = {
                name: sorted((value(row), row["robust_accuracy"]) for row in of_model if row["attack"] == name)
                for name in (row["attack"] for row in of_model)
            }
            several = {name: pairs for name, pairs in attacks.items() if len(pairs) > 1}
            if len(attacks) == 1:
                lines = {next(iter(attacks)): points}
            else:
                lines = {"worst case": points} | several
            if len(figures) == 1 or len(lines) > 1:
                expected.append((model + (", attack by attack" if len(lines) > 1 else ""), lines))
    actual = [(chart.caption, chart.lines) for chart in drawn(page_of(records, combined))]
    assert [caption for caption, _ in actual] == [caption for caption, _ in expected]
    for (_, lines), (_, expected_lines) in zip(actual, expected, strict=True):
        assert lines == {name: near(pairs) for name, pairs in expected_lines.items()}


def test_all_points_of_a_model_with_fewer_attacks_are_hollow():
    rows = [
        record(f"l2:{eps}", model=model, attack=attack)
        for model, attack in (("a", "fgsm"), ("b", "fgsm"), ("b", "pgd"))
        for eps in (1, 2)
    ]
    charts = drawn(page_of(rows))
    assert charts[0].hollow == {"a": [False, True, True], "b": [False, False, False]}
    assert [chart.caption for chart in charts[1:]] == ["b, attack by attack"]  # model a has no other line


def test_only_the_worst_case_has_whiskers_and_they_span_its_interval():
    rows = [record(f"l2:{eps}", robust, attack=attack) for eps, robust in ((1, 0.5), (2, 0.25)) for attack in ("fgsm", "pgd")]
    combined = [worst_case("l2:1", 0.4, low=0.125, high=0.75), worst_case("l2:2", 0.2, low=0.0, high=0.5)]
    (chart,) = drawn(page_of(rows, combined))
    heights = []
    for path in chart.classed("path", "whisker"):
        x, top, bottom = re.match(r"M(\S+) (\S+)V([\d.]+)", path.get("d")).groups()
        heights.append((chart.eps(float(x)), *((chart.zero - float(y)) / (chart.zero - chart.one) for y in (bottom, top))))
    assert heights == near([(1, 0.125, 0.75), (2, 0.0, 0.5)])


@settings(deadline=None, max_examples=30)
@given(runs())
def test_lines_go_through_their_points(run):
    for chart in drawn(page_of(*run)):
        paths = [re.findall(r"[\d.]+", path.get("d")) for path in chart.classed("path", "line")]
        points = [
            (chart.eps(float(x)), (chart.zero - float(y)) / (chart.zero - chart.one))
            for path in paths
            for x, y in zip(path[::2], path[1::2], strict=True)
        ]
        assert points == near([pair for pairs in chart.lines.values() for pair in pairs])


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record()],
        [record("linf:0.1"), record("linf:0.1", attack="fgsm"), record("linf:1/10")],
        [record("linf:0.1"), record("l2:1")],
        [record("linf:0.1"), record("linf:0.2", data="other")],
        [record("linf:0.1"), record("linf:0.2", defence="jpeg")],
        [record("linf:0.1"), record("linf:0.2", model="other")],
        [record("linf:0.1"), record("linf:0.2", goal="least-likely")],
        [record("linf:0.1"), record("linf:"), record("linf"), record("linf:much"), record("linf:nan"), record("linf:-1")],
        [record("shift:1"), record("shift:2")],
    ],
)
def test_a_single_eps_has_no_chart(records):
    assert families(results_of(records)) == []
    assert 'id="curves"' not in page_of(records)


def test_without_a_worst_case_the_lowest_attack_is_drawn_and_the_legend_says_so():
    rows = [
        record(f"linf:{eps}", robust, attack=attack)
        for eps, attack, robust in [(0.1, "fgsm", 0.9), (0.1, "pgd", 0.8), (0.2, "fgsm", 0.6), (0.2, "pgd", 0.5)]
    ]
    legend = "the lowest single attack is shown"
    both = [worst_case("linf:0.1", 0.7), worst_case("linf:0.2", 0.4)]
    for combined, expected in ((both, [0.7, 0.4]), (both[:1], [0.7, 0.5]), ([], [0.8, 0.5])):
        page = page_of(rows, combined)
        (chart,) = drawn(page)
        assert chart.lines["worst case"] == near([(0, 0.97), (0.1, expected[0]), (0.2, expected[1])])
        assert (legend in text_of(section(page))) is (len(combined) < 2)
    assert legend not in section(page_of([record("linf:0.1"), record("linf:0.2")]))  # a single attack is the worst case


def test_points_with_fewer_attacks_are_hollow_and_the_legend_says_so():
    rows = [
        record(f"linf:{eps}", 0.5, attack=attack, model=model)
        for model, eps, attack in [
            ("a", 0.1, "fgsm"),
            ("a", 0.2, "fgsm"),
            ("a", 0.2, "pgd"),
            ("b", 0.1, "pgd"),
            ("b", 0.1, "fgsm"),
            ("b", 0.2, "pgd"),
        ]
    ]
    page = page_of(rows)
    hollow = {chart.caption.split(",")[0]: chart.hollow for chart in drawn(page)}
    assert hollow["All models"] == {"a": [False, True, False], "b": [False, False, True]}
    assert hollow["a"]["worst case"] == [False, True, False]
    assert hollow["a"]["fgsm"] == [False, False]
    assert "Hollow: fewer attacks were run at this eps" in text_of(section(page))
    assert "Hollow" not in section(page_of([row for row in rows if row["attack"] == "pgd" or row["model"] == "a"][1:3]))
    aimed = record("linf:0.2", 0.5, goal="least-likely")
    (chart,) = drawn(page_of([record("linf:0.1"), record("linf:0.2"), aimed]))
    assert chart.hollow["worst case"] == [False, True, False]  # an attack with another goal counts too


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=6))
def test_only_rises_are_noted(counts):
    (chart,) = drawn(page_of([record(f"pixels:{eps}", count / 20) for eps, count in enumerate(counts, start=1)]))
    rises = [
        (later - min(counts[:index]), index) for index, later in enumerate(counts) if index and later > min(counts[:index])
    ]
    assert ("Rises with eps" in chart.notes) is bool(rises)
    if rises:
        index = max(rises, key=lambda rise: (rise[0], -rise[1]))[1]
        low = min(range(index), key=lambda before: counts[before])
        assert f"pgd, {5.0 * counts[low]:.1f} % at {low + 1} but {5.0 * counts[index]:.1f} % at {index + 1}" in chart.notes
    assert chart.lines["pgd"][1:] == near([(eps, count / 20) for eps, count in enumerate(counts, start=1)])


def test_points_of_different_numbers_of_images_are_noted_and_are_not_a_rise():
    page = page_of([record("l2:1", 0.5), record("l2:2", 0.6, n=200)])
    assert "Rises" not in page
    assert "The points have different numbers of images." in text_of(section(page))
    two = [record(f"{norm}:{eps}", n=n, data=norm) for norm, n in (("l2", 100), ("l1", 200)) for eps in (1, 2)]
    assert "Not all points" not in page_of(two)
    low, high = (Point(eps, str(eps), share, 100) for eps, share in ((1.0, 0.5), (2.0, 0.6)))
    assert Line("pgd", (low, high), 0, main=False).rises() == [(low, high)]


def test_only_flagged_points_have_a_flag():
    flag = [{"name": "flat-gradients", "why": "nothing to climb"}]
    page = page_of([record("l2:1", 0.9), record("l2:2", 0.8, flags=flag), record("l2:3", 0.7)])
    (chart,) = drawn(page)
    assert [chart.eps(float(mark.get("x"))) for mark in chart.classed("text", "alert")] == [pytest.approx(2, abs=1e-3)]
    assert "a number at this eps is flagged" in text_of(section(page))
    assert "⚑" not in section(page_of([record("l2:1"), record("l2:2")]))


def test_each_seed_has_its_own_named_line():
    rows = [record(f"l2:{eps}", 0.9 - eps / 10 - seed / 10, seed=seed) for eps in (1, 2) for seed in (0, 1)]
    (chart,) = drawn(page_of(rows))
    assert {name: [share for _, share in pairs] for name, pairs in chart.lines.items()} == {
        "worst case": near([0.97, 0.7, 0.6]),
        "pgd, seed 0": near([0.8, 0.7]),
        "pgd, seed 1": near([0.7, 0.6]),
    }


def test_two_spellings_of_an_eps_are_one_point_with_the_lower_figure():
    (chart,) = drawn(page_of([record("linf:0.1", 0.6), record("linf:1/10", 0.5), record("linf:0.2", 0.4)]))
    assert chart.lines["pgd"] == near([(0, 0.97), (0.1, 0.5), (0.2, 0.4)])


def test_ticks_are_written_as_in_the_threat_and_never_overlap():
    texts = ["1/255", "2/255", "4/255", "8/255", "16/255"]
    (chart,) = drawn(page_of([record(f"linf:{eps}") for eps in texts]))
    assert {"0", "16/255", "8/255"} < chart.ticks.keys() <= {"0", *texts}
    spans = sorted((x - 3 * len(text), x + 3 * len(text)) for text, x in chart.ticks.items())
    assert all(left[1] < right[0] for left, right in pairwise(spans))
    (chart,) = drawn(page_of([record("l2:0.1234567890123"), record("l2:3.0")]))
    assert chart.ticks.keys() <= {"0", "0.123", "3.0"}


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_every_norm_has_its_axis(norm):
    (chart,) = drawn(page_of([record(f"{norm}:1"), record(f"{norm}:2")]))
    assert [text.text for text in chart.classed("text", "title")] == [NORMS[norm]]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 97), st.sampled_from(["a", "zoo:mnist-cnn-robust", LONG, "模型" * 9])), max_size=25))
def test_labels_are_inside_the_chart_and_never_overlap(models):
    rows = [
        record(f"l2:{eps}", share / 100, model=f"{number}{name}{number}")
        for number, (share, name) in enumerate([(3, "x"), (3, "y"), *models])
        for eps in (1, 2)
    ]
    charts = drawn(page_of(rows))
    heights = [y for _, _, y in charts[0].labels]
    assert heights == sorted(heights)
    assert all(below - above >= 13 for above, below in pairwise(heights))
    assert min(heights) >= 6
    assert max(heights) <= charts[0].zero + 7
    assert charts[0].zero < charts[0].height
    assert len({line.get("d") for line in charts[0].classed("path", "leader")}) == len(models) + 2


def test_long_names_have_distinct_short_labels_and_are_listed_in_full_below():
    names = [LONG + "x" + LONG, LONG + "y" + LONG, LONG]
    (chart,) = drawn(page_of([record(f"l2:{eps}", model=name) for name in names for eps in (1, 2)]))
    assert all(len(text) <= 13 for text, _, _ in chart.labels)
    joined = "".join(text for text, _, _ in chart.labels)
    assert all(f"({number})" in joined for number in (1, 2, 3))
    assert all(f" is {name}" in chart.notes for name in names)


def test_labels_omit_the_common_file_of_all_models():
    names = ["some/models.py:small_net_without_defence", "some/models.py:net_behind_jpeg"]
    (chart,) = drawn(page_of([record(f"l2:{eps}", model=name) for name in names for eps in (1, 2)]))
    assert {text for text, _, _ in chart.labels} == {"small_net_wit", "hout_defence", "net_behind_", "jpeg"}
    assert all(f" is {name}" in chart.notes for name in names)
    (chart,) = drawn(page_of([record(f"l2:{eps}", model=name) for name in ("zoo:a", "zoo:b") for eps in (1, 2)]))
    assert {text for text, _, _ in chart.labels} == {"zoo:a", "zoo:b"}


def test_attacks_without_a_line_are_named():
    rows = [record(f"l2:{eps}", attack=attack) for attack, eps in (("fgsm", 1), ("pgd", 1), ("pgd", 2), ("cw", 2))]
    (chart,) = drawn(page_of(rows))
    assert "Run at one eps only, so there is no line: fgsm, cw." in chart.notes
    assert "without a line" not in section(page_of(rows[1:3]))


def test_lines_can_be_distinguished_without_colour():
    rows = [
        record(f"l2:{eps}", model=f"m{number}", attack=f"a{other}")
        for number in range(12)
        for eps in (1, 2)
        for other in range(12)
    ]
    charts = drawn(page_of(rows))
    for chart, kind in ((charts[0], "main"), (charts[1], "thin")):
        groups = [group for group in chart.svg.iter("g") if group.get("class").startswith(kind) and group.find("text") is None]
        looks = {(group[0].get("stroke-dasharray"), list(group)[-1].get("d")) for group in groups}
        assert len(groups) == len(looks) == 12
        assert kind == "main" or None not in {dashes for dashes, _ in looks}  # only main lines may be solid


@pytest.mark.parametrize("name", [HOSTILE, TURNED, "\"'", "]]>", "&lt;", "bad\udcff.py", "", LONG], ids=ascii)
def test_hostile_names_are_escaped_in_a_well_formed_chart(name):
    rows = [
        record(f"linf:{eps}", 0.5, model=model, attack=attack, data=name, defence=name)
        for model in (name, "other")
        for attack in (name, "pgd")
        for eps in (0.1, 0.2)
    ]
    page = page_of(rows)
    charts = drawn(page) if name != TURNED else []  # XML forbids control characters, HTML does not
    assert len(charts) == (3 if name != TURNED else 0)
    assert set(Text(section(page)).tags) <= {
        "h2",
        "h3",
        "p",
        "div",
        "figure",
        "figcaption",
        "b",
        "span",
        "svg",
        "g",
        "path",
        "text",
        "title",
    }
    for svg in re.findall(r'<svg class="curve".*?</svg>', page, re.S):
        shown = re.findall(r'aria-label="[^"]*"|<text[^>]*>[^<]*', svg)
        assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x08]", "".join(shown))


def test_a_chart_has_a_text_description():
    rows = [record("linf:1/255", 0.5, model=model) for model in ("a", "b")] + [
        record("linf:0.2", 0.25, model=model) for model in ("a", "b")
    ]
    chart = drawn(page_of(rows))[0]
    assert chart.svg.get("role") == "img"
    assert chart.svg.get("aria-label") == (
        "Robust accuracy on digits against eps (linf). a: 97.0 % at 0, 50.0 % at 1/255, 25.0 % at 0.2; "
        "b: 97.0 % at 0, 50.0 % at 1/255, 25.0 % at 0.2"
    )


def test_ids_are_unique_and_rendering_is_deterministic_and_keeps_its_arguments():
    flag = [{"name": "f", "why": "w"}]
    rows = [record(f"{norm}:{eps}", model=model, flags=flag) for norm in NORMS for eps in (1, 2) for model in ("a", "b")]
    before = copy.deepcopy(rows)
    page = page_of(rows)
    ids = Text(page).ids
    assert len(ids) == len(set(ids)) >= 3
    assert page == page_of(rows)
    assert rows == before
    assert [family.norm for family in families(results_of(rows))] == list(NORMS)


# Curves of single records


class Steps(Drawn):
    """A chart whose lines are steps, read back from the page."""

    def __init__(self, figure, logarithmic):
        super().__init__(figure)
        self.logarithmic, self.steps = logarithmic, []
        for path in self.classed("path", "line"):
            x, y, *rest = re.findall(r"[MHV ](-?[\d.]+)", path.get("d"))
            assert re.fullmatch(r"M\S+ \S+?(H[\d.]+V[\d.]+)*", path.get("d"))
            positions = [(x, y), *zip(rest[::2], rest[1::2], strict=True)]
            self.steps.append([(self.value(float(x)), (self.zero - float(y)) / (self.zero - self.one)) for x, y in positions])

    def value(self, x):
        if not self.logarithmic:
            return self.eps(x)
        tens = {float(text.replace(",", "")): at for text, at in self.ticks.items()}
        return 10 ** ((x - tens[1]) / (tens[10] - tens[1]))


def step_charts(page, section, logarithmic=False):
    if f'<section id="{section}">' not in page:
        return []
    figures = page.split(f'<section id="{section}">')[1].split("</section>")[0].split("<figure>")[1:]
    return [Steps(figure, logarithmic) for figure in figures]


AGAINST_COST = [[0.0, 0.97], [3.0, 0.9], [40.0, 0.5], [1500.0, 0.5]]
AGAINST_EPS = [[0.0, 0.97], [0.05, 0.8], [0.1, 0.4]]


def near_steps(curve, low=0.0):
    return [(pytest.approx(max(x, low), rel=0.02, abs=1e-3), pytest.approx(share, abs=1e-3)) for x, share in curve]


def test_each_recorded_curve_against_cost_is_drawn():
    fast = [[0.0, 0.97], [1.0, 0.97], [12.0, 0.6]]
    rows = [
        record(attack="standard", against_cost=AGAINST_COST),
        record(attack="pgd", against_cost=fast),
        record(attack="fmn", against_cost=None),
        record("l2:1", against_cost=AGAINST_COST),
    ]
    both, alone = step_charts(page_of(rows), "cost", logarithmic=True)
    assert [near_steps(curve, 1.0) for curve in (AGAINST_COST, fast)] == both.steps
    assert (both.caption, alone.caption) == ("m under linf:0.1 on digits", "m under l2:1 on digits")
    assert both.ticks.keys() == {"1", "10", "100", "1,000"}
    assert alone.steps == [near_steps(AGAINST_COST, 1.0)]
    assert {text for text, _, _ in both.labels} == {"standard", "pgd"}
    assert both.classed("path", "point") == []
    assert "standard: 97.0 % at 0, 50.0 % at 1,500" in both.svg.get("aria-label")
    assert 'id="cost"' not in page_of([record()])


def test_a_curve_against_eps_is_drawn_with_the_other_attacks_at_their_eps():
    rows = [
        record(attack="fmn", robust=0.4, against_eps=AGAINST_EPS),
        record("linf:0.05", 0.7, attack="pgd"),
        record("linf:0.1", 0.3, attack="pgd"),
        record("linf:0.2", 0.1, attack="pgd"),
        record("l2:0.1", 0.2, attack="pgd"),
        record("linf:0.1", 0.9, attack="aimed", goal="least-likely"),
        record(model="other", attack="pgd"),
    ]
    (chart,) = step_charts(page_of(rows), "all-eps")
    assert chart.steps == [near_steps(AGAINST_EPS)]  # one line; the other attacks are marks
    assert chart.lines == {"pgd": near([(0.05, 0.7), (0.1, 0.3)])}  # without larger eps and other norms, goals and models
    assert (chart.caption, chart.ticks.keys()) == ("m on digits", {"0", "0.05", "0.1"})
    assert 'id="all-eps"' not in page_of(rows[1:])


def test_curves_of_different_seeds_and_threats_have_different_labels():
    rows = [record(attack="fmn", seed=seed, against_eps=AGAINST_EPS, against_cost=AGAINST_COST) for seed in (0, 1)]
    (chart,) = step_charts(page_of(rows), "all-eps")
    assert "".join(text for text, _, _ in chart.labels) == "fmn, seed 0fmn, seed 1"
    (chart,) = step_charts(page_of([rows[0], record("linf:0.2", attack="fmn", against_eps=AGAINST_EPS)]), "all-eps")
    assert "".join(text for text, _, _ in chart.labels) == "fmn, linf:0.1fmn, linf:0.2"


def stage(name, forwards, backwards, solved):
    return {"name": name, "forwards": forwards, "backwards": backwards, "solved": solved}


def test_the_stage_table_has_solved_and_unsolved_images_and_cost():
    stages = [
        stage("clean", 100, 0, 3),
        stage("descent", 1940, 1000, 60),
        stage("patches", 40, 10, 0),
        stage("attack", 37, 0, 0),
    ]
    page = page_of(
        [record(attack="standard", stages=stages), record(stages=[stage("clean", 1, 0, 1), stage("attack", 1, 0, 1)])]
    )
    table = page.split('<section id="stages">')[1].split("</section>")[0]
    cells = [text_of(row).split() for row in table.split('<tr role="row" class="row">')[1:]]
    assert cells == [
        ["clean", "3", "97.0", "%", "1", "2.4", "%"],
        ["descent", "60", "37.0", "%", "39.4", "95.2", "%"],
        ["patches", "0", "37.0", "%", "0.6", "1.5", "%"],
        ["attack", "0", "37.0", "%", "0.4", "0.9", "%"],
    ]
    assert text_of(table).count("standard on m under linf:0.1") == 1
    assert 'id="stages"' not in page_of([record(stages=stages[:1])])  # every attack has the stage clean


def test_the_legend_states_that_the_cost_of_warm_starts_is_not_counted():
    legend = "their cost is not counted"
    assert legend in page_of([record(against_cost=AGAINST_COST, stages=[stage("clean", 1, 0, 0), stage("starts", 1, 0, 4)])])
    assert legend not in page_of([record(against_cost=AGAINST_COST, stages=[stage("clean", 1, 0, 0)])])


@pytest.mark.parametrize("name", [HOSTILE, "]]>", "bad\udcff.py", LONG], ids=ascii)
def test_hostile_names_are_escaped_in_curves_and_stages(name):
    rows = [
        record(attack=name, model=name, data=name, against_cost=AGAINST_COST, against_eps=None, stages=[stage(name, 1, 1, 1)]),
        record(attack=name, model=name, data=name, against_eps=AGAINST_EPS, against_cost=None),
    ]
    page = page_of(rows)
    assert len(step_charts(page, "cost", logarithmic=True)) == len(step_charts(page, "all-eps")) == 1
    assert "<script" not in page
    assert len(Text(page).ids) == len(set(Text(page).ids))
    assert all(f'href="#{one}"' in page for one in ("all-eps", "cost", "stages"))


def test_every_interval_is_explained():
    text = text_of(page_of([record(f"linf:{eps}") for eps in (0.1, 0.2)]))
    assert text.count("95 % Wilson interval over the choice of images") == 3  # in the header, the curves and the table
    assert "the rate itself is an upper bound on robustness" in text
