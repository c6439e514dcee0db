"""The HTML report: its figures are those of the records, names are escaped, and it loads nothing."""

from __future__ import annotations

import base64
import inspect
import io
import json
import re
import shutil
import subprocess
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from robustkit.bench.reporting.page import Picture, report
from robustkit.errors import ArgumentError, ShapeError

COMMAND = "robustkit bench --model zoo:m --threat linf:0.3"
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}"""
LONG = "a/very/long/path" * 40


def record(**changes):
    base = {
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
    }
    assert base.keys() >= changes.keys() - {"fooling_train", "fooling_held_out", "fooling_random", "transfer", "collapse"}
    return base | changes


def picture(clean, adversarial, **changes):
    defaults = {
        "model": "m",
        "attack": "pgd",
        "goal": "misclassify",
        "threat": "linf:0.3",
        "index": 3,
        "label": "7",
        "clean_as": "7",
        "clean_confidence": 0.999,
        "adversarial_as": "3",
        "adversarial_confidence": 0.512,
        "size": 0.3,
        "success": True,
    }
    return Picture(clean=clean, adversarial=adversarial, **(defaults | changes))


def page_of(records, pictures=(), command=COMMAND, environment=None):
    results = {"robustkit": "0.1.0", "schema": 1, "environment": environment or {"torch": "2.13.0"}, "records": records}
    return report(results, pictures, command=command)


def images(seed=0, channels=1, side=28, eps=0.3):
    rng = np.random.default_rng(seed)
    clean = rng.random((channels, side, side), dtype=np.float32)
    return clean, np.clip(clean + rng.uniform(-eps, eps, clean.shape).astype(np.float32), 0, 1)


class Tree(HTMLParser):
    """All tags with their attributes, and all text, as a browser reads them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.pieces = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.pieces.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())  # split() takes no-break spaces too


def rows(page):
    """The class of each table row by the name of its attack."""
    return {name: kind.split() for kind, name in re.findall(r'<tr role="row" class="(row[^"]*)">.*?"name">(.*?)<', page, re.S)}


def decode(uri):
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))
    return drawn[None] if drawn.ndim == 2 else drawn.transpose(2, 0, 1)


def percent(share):
    return f"{100 * share:.1f} %"


@st.composite
def records(draw, goals=("misclassify", "least-likely", "classify-as:3")):
    def one(number):
        robust = draw(st.integers(0, 20)) / 20  # coarse, so that there are ties
        return record(
            model=draw(st.sampled_from(["m1", "m2"])),
            defence=draw(st.sampled_from([None, "jpeg"])),
            goal=draw(st.sampled_from(goals)),
            threat=draw(st.sampled_from(["linf:0.3", "l2:2"])),
            attack=f"attack-{number}",
            robust_accuracy=robust,
            success_rate=draw(st.floats(0, 1)),
            clean_accuracy=draw(st.floats(robust, 1)),
            median_size=draw(st.sampled_from([None, float("nan"), 0.0, 0.0123, 1.0, 1234.5])),
        )

    return [one(number) for number in range(draw(st.integers(1, 7)))]


@settings(deadline=None, max_examples=60)
@given(records())
def test_the_lowest_rows_are_marked_if_others_are_higher(drawn):
    shares_of = defaultdict(set)
    for row in drawn:
        if row["goal"] == "misclassify":
            shares_of[row["model"], row["defence"], row["threat"]].add(row["robust_accuracy"])
    expected = {
        row["attack"]
        for row in drawn
        for shares in [shares_of[row["model"], row["defence"], row["threat"]]]
        if row["goal"] == "misclassify" and row["robust_accuracy"] == min(shares) < max(shares)
    }
    page = page_of(drawn)
    assert {name for name, kind in rows(page).items() if "lowest" in kind} == expected
    assert page.count('<span class="mark">lowest</span>') == len(expected)


@settings(deadline=None, max_examples=60)
@given(records())
def test_every_record_is_one_row_with_its_figures(drawn):
    page = page_of(drawn)
    assert sorted(rows(page)) == sorted(row["attack"] for row in drawn)
    for row in drawn:
        cells = page.split(f'<span class="name">{row["attack"]}</span>')[1].split("</tr>")[0]
        text = Tree(cells).text
        for name in ("robust_accuracy", "clean_accuracy", "success_rate", "low", "high"):
            assert percent(row[name]) in text


@settings(deadline=None, max_examples=40)
@given(records())
def test_the_header_has_the_lowest_robust_accuracy_of_each_threat(drawn):
    header = page_of(drawn).split("<header>")[1].split("</header>")[0]
    assert "Every robust accuracy is an upper bound" in header
    threats = list(dict.fromkeys(row["threat"] for row in drawn))
    answers = {}
    for part in header.split('<tr role="row" class="verdict">')[1:]:
        name, *cells = (Tree(cell).text for cell in re.split("<td[^>]*>", part.split("</tr>")[0]))
        answers[name.split("100 images")[0].strip()] = dict(zip(["Clean", *threats], cells, strict=True))
    for model, defence, threat in {(row["model"], row["defence"], row["threat"]) for row in drawn}:
        group = [row for row in drawn if (row["model"], row["defence"], row["threat"]) == (model, defence, threat)]
        untargeted = [row["robust_accuracy"] for row in group if row["goal"] == "misclassify"]
        answer = answers[model + (f" behind {defence}" if defence else "")][threat]
        assert answer == (f"{percent(min(untargeted))} 7.0 % to 20.0 %" if untargeted else "– only other goals")
        assert len(answers) == len({(row["model"], row["defence"]) for row in drawn})


def test_a_targeted_attack_is_never_shown_as_robustness():
    targeted = record(goal="least-likely", robust_accuracy=0.961, success_rate=0.002, attack="aimed")
    page = page_of([targeted])
    assert "96.1" not in Tree(page.split("<header>")[1].split("</header>")[0]).text
    assert "Untargeted attacks" not in page
    assert "<svg" not in page  # only robust accuracy has a bar
    section = Tree(page.split('<section class="targeted">')[1].split("</section>")[0]).text
    assert "Read the success rate." in section
    assert "not robustness" in section
    both = page_of([targeted, record(robust_accuracy=0.99)])
    assert both.index("Untargeted attacks") < both.index("Attacks with another goal")
    assert rows(both) == {"pgd": ["row"], "aimed": ["row"]}


def test_the_header_marks_flagged_figures_and_threats_that_were_not_run():
    page = page_of([record(flags=[{"name": "f", "why": "w"}]), record(model="other", threat="l2:2")])
    cells = [Tree(cell.split("</td>")[0]).text for cell in page.split("</header>")[0].split("<td")[1:]]
    assert [cell.partition(">")[2] for cell in cells] == [
        "97.0 %",
        "12.3 % ⚑ flagged",
        "– not run",
        "97.0 %",
        "– not run",
        "12.3 % 7.0 % to 20.0 %",
    ]
    assert page.split("</header>")[0].count('<b class="figure">') == 1


def test_every_link_has_a_target():
    flag = {"name": "f", "why": "w"}
    page = page_of([record(threat=f"linf:{eps}", flags=[flag]) for eps in (0.1, 0.3)], [picture(*images())])
    tree = Tree(page)
    assert {attrs["href"][1:] for attrs in tree.all("a")} <= {attrs.get("id") for _, attrs in tree.tags}
    assert [
        one for one in ("curves", "attacks", "flags", "terms", "reproduce", "pictures") if f'href="#{one}"' not in page
    ] == []
    assert 'href="#pictures"' not in page_of([record()])


def test_a_flag_lists_its_cases_once_with_all_their_threats():
    flag = {"name": "f", "why": "w"}
    drawn = [
        record(threat=threat, goal=goal, flags=[flag])
        for goal in ("misclassify", "least-likely")
        for threat in ("linf:0.1", "l2:2")
    ]
    text = Tree(page_of(drawn).split('<ol class="flags">')[1].split("</ol>")[0]).text
    assert text == "f: w m: pgd under linf:0.1, l2:2 m: pgd, goal least-likely, under linf:0.1, l2:2"


def test_hashes_of_data_and_weights_and_the_seed_are_listed():
    results = {
        "robustkit": "0.1.0",
        "environment": {},
        "data": {"offset": 50},
        "records": [record() | {"data_hash": "da7a", "model_hash": "5ea1"}],
    }
    sources = report(results, [], command=COMMAND).split("<h3>Data and weights</h3>")[1].split("</dl>")[0]
    assert Tree(sources.replace("<dd>", "<dd>: ").replace("</div>", "; ")).text == (
        "digits: 100 images after the first 50, hash da7a; m: hash 5ea1; seed: 0;"
    )
    assert "hash da" not in page_of([record()])


def test_bar_and_whisker_are_at_the_figures():
    page = page_of([record(robust_accuracy=0.25, low=0.125, high=0.5, clean_accuracy=0.75)])
    assert 'class="fill" y="3" width="25.000"' in page
    assert "M12.500 6H50.000" in page
    assert 'class="tick" d="M75.000 0V12"' in page


def test_each_flag_is_explained_once_and_notes_are_collapsed():
    flag = {"name": "flat-gradient", "why": "nothing to climb"}
    note = {"name": "memory", "why": "the batch was halved"}
    page = page_of([record(attack="a", flags=[flag], notes=[note]), record(attack="b", flags=[flag], robust_accuracy=0.5)])
    tree = Tree(page)
    assert "1 flag." in tree.text.split("Untargeted attacks")[0]
    assert page.count("nothing to climb") == 1
    links = [attrs["href"] for attrs in tree.all("a") if "flag" in attrs.get("class", "")]
    assert links.count("#flag-1") == 2
    assert any(attrs.get("id") == "flag-1" for attrs in tree.all("li"))
    assert "the batch was halved" in page.split("<details>")[1].split("</details>")[0]
    assert all("flagged" in kind for kind in rows(page).values())
    assert "No flag in 1 record." in page_of([record()])


def test_sizes_costs_and_times_are_formatted():
    row = record(median_size=1.5, forwards=81_200, backwards=150, n=100, seconds=0.04)
    page = page_of([row]).replace("\N{NO-BREAK SPACE}", " ")
    cost = '814<span class="quiet">812 + 1.5</span>'
    for label, text in {"Median size": "1.50", "Cost per image": cost, "Time": "&lt; 0.1 s", "Images": "100"}.items():
        assert f'data-label="{label}">{text}</td>' in page
    for missing in (None, float("nan")):
        assert 'data-label="Median size">–<' in page_of([record(median_size=missing)])


def test_universal_attacks_show_all_fooling_rates_and_the_perturbation():
    """One row per perturbation and one column per model; a dash where the perturbation was not evaluated."""
    one = record(
        fooling_train=0.451,
        fooling_held_out=0.389,
        fooling_random=0.02,
        transfer={"other": 0.123},
        collapse={"class": "8", "share": 0.71},
    )
    two = record(threat="linf:0.2", fooling_train=0.5, fooling_held_out=0.4, fooling_random=0.03, transfer={}, collapse=None)
    perturbation = np.zeros((1, 4, 4), np.float32)
    perturbation[0, 0] = (0.125, -0.25, 0.25, 0.0)
    shown = picture(
        np.zeros((1, 4, 4), np.float32),
        np.zeros((1, 4, 4), np.float32),
        attack=one["attack"],
        model=one["model"],
        threat=one["threat"],
        perturbation=perturbation,
    )
    page = page_of([one, two], [shown])
    text = " ".join(Tree(page).text.split())
    for figure in ("45.1 %", "38.9 %", "12.3 %", "2.0 %", "8 71.0 % of those that change", "40.0 %", "not drawn", "× 2"):
        assert figure in text, figure
    (drawn,) = re.findall(r'class="delta"[^>]*src="data:image/png;base64,([^"]+)"', page)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn))))
    assert pixels[0].tolist() == [192, 0, 255, 128]
    assert 'id="universal"' not in page_of([record()])


def test_a_page_without_records_and_pictures():
    assert "Nothing was measured" in page_of([])
    assert "<img" not in page_of([record()])


def test_seeds_are_shown_where_they_differ():
    assert ", seed 0" not in page_of([record()])
    page = page_of([record(), record(seed=1)])
    assert ", seed 0" in page
    assert ", seed 1" in page


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    channels=st.sampled_from([1, 3]),
    side=st.integers(1, 40),
    eps=st.sampled_from([0.0, 1e-7, 1 / 255, 8 / 255, 0.3, 1.0]),
)
def test_pictures_are_the_images_and_the_perturbation_at_the_stated_scale(seed, channels, side, eps):
    clean, adversarial = images(seed, channels, side, eps)
    shown = Tree(page_of([record()], [picture(clean, adversarial)])).all("img")
    first, middle, last = (decode(attrs["src"]) for attrs in shown)
    assert np.array_equal(first, np.rint(clean.astype(float) * 255))
    assert np.array_equal(last, np.rint(adversarial.astype(float) * 255))
    delta = adversarial.astype(float) - clean
    if not delta.any():
        assert shown[1]["alt"] == "No perturbation"
        assert (middle == 128).all()
        return
    scale = float(re.fullmatch(r"The perturbation, amplified (\S+) times", shown[1]["alt"])[1])
    assert np.abs((middle - 128.0) / 255 - scale * delta).max() <= 1.01 / 255  # rounding by half a grey level, and one at white
    assert 0.45 < scale * np.abs(delta).max() <= 0.5 + 1e-9


def test_pictures_are_in_the_order_of_the_table_and_those_without_a_record_last():
    clean, adversarial = images()
    pictures = [
        picture(clean, adversarial, attack=name, goal=goal)
        for name, goal in [("stray", "misclassify"), ("aimed", "least-likely"), ("pgd", "misclassify")]
    ]
    page = page_of([record(attack="aimed", goal="least-likely"), record()], pictures)
    albums = [Tree(part.split("</h3>")[0]).text for part in page.split("<h2>Pictures</h2>")[1].split("<h3>")[1:4]]
    assert [text.split()[1] for text in albums] == ["pgd", "aimed", "stray"]
    assert "goal least-likely" in albums[1]


@pytest.mark.parametrize(("side", "width", "enlarged"), [(8, 96, True), (28, 84, True), (32, 96, True), (200, 96, False)])
def test_small_pictures_are_enlarged_by_integers_and_large_ones_shrunk(side, width, enlarged):
    page = page_of([record()], [picture(*images(side=side))])
    assert {attrs["width"] for attrs in Tree(page).all("img")} == {str(width)}
    assert ('class="triple enlarged"' in page) is enlarged
    assert re.search(r"\.enlarged img \{ image-rendering: pixelated; \}", page)


def test_captions_and_alt_texts_have_classes_and_confidences():
    page = page_of([record()], [picture(*images()), picture(*images(), success=False)])
    tree = Tree(page)
    assert "as 7, 99.9 %" in tree.text
    assert "as 3, 51.2 %" in tree.text
    assert "attack succeeded image 3, true class 7, size 0.300" in tree.text
    assert "attack failed image 3" in tree.text
    assert "goal reached image 3" in Tree(page_of([record()], [picture(*images(), goal="least-likely")])).text
    assert all(attrs["alt"] for attrs in tree.all("img"))


@pytest.mark.parametrize("shape", [(28, 28), (2, 28, 28), (28, 28, 3), (1, 0, 28)])
def test_a_picture_of_another_shape_is_refused(shape):
    with pytest.raises(ShapeError, match="clean has shape"):
        picture(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_a_picture_outside_the_bounds_or_of_two_shapes_is_refused(value):
    clean = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(ArgumentError, match="adversarial of picture 3"):
        picture(clean, np.full_like(clean, value))
    with pytest.raises(ShapeError, match="must be equal"):
        picture(clean, np.zeros((3, 4, 4), np.float32))


def test_hostile_names_are_escaped():
    row = record(
        model=HOSTILE,
        attack=HOSTILE,
        data=HOSTILE,
        defence=HOSTILE,
        threat=HOSTILE,
        access=HOSTILE,
        flags=[{"name": HOSTILE, "why": HOSTILE}],
        notes=[{"name": HOSTILE, "why": HOSTILE}],
    )
    labels = {
        "model": HOSTILE,
        "attack": HOSTILE,
        "threat": HOSTILE,
        "label": HOSTILE,
        "clean_as": HOSTILE,
        "adversarial_as": HOSTILE,
    }
    pictures = [picture(*images(), **labels)]
    page = page_of([row, row | {"goal": HOSTILE}], pictures, HOSTILE, {HOSTILE: HOSTILE})
    tree = Tree(page)
    assert not tree.all("script")
    assert all(attrs["src"].startswith("data:image/png") for attrs in tree.all("img"))
    assert not [name for _, attrs in tree.tags for name in attrs if name.startswith("on")]
    assert HOSTILE in tree.text
    assert "49" not in tree.text.split("How to read it")[1]  # a name is not a template
    calm = page_of([record(), record(goal="other")], [picture(*images())])
    assert {name for name, _ in tree.tags} <= {name for name, _ in Tree(calm).tags} | {"a", "details", "summary", "ul"}


def test_a_file_name_that_is_not_unicode_can_be_written():
    assert "bad\\udcff.py" in page_of([record(model="bad\udcff.py")]).encode("utf-8").decode("utf-8")


def test_the_page_loads_nothing():
    page = page_of([record(flags=[{"name": "f", "why": "w"}])], [picture(*images(channels=3))])
    tree = Tree(page)
    assert not {name for name, _ in tree.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
        "source",
    }
    for tag, attrs in tree.tags:
        for name in ("src", "href", "srcset", "data", "xlink:href"):
            assert attrs.get(name, "#").startswith(("data:", "#")) or tag == "a"
    assert not re.search(r"url\(|@import|@font-face", page)
    policy = next(attrs["content"] for attrs in tree.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_rendering_is_deterministic_and_keeps_its_arguments():
    given_records, given_pictures = [record(), record(attack="b", robust_accuracy=0.0)], [picture(*images())]
    before = json.dumps(given_records)
    assert page_of(given_records, given_pictures) == page_of(given_records, given_pictures)
    assert json.dumps(given_records) == before


def test_the_page_stays_small():
    drawn = [record(attack=f"a{number}") for number in range(8)]
    pictures = [picture(*images(seed), attack=f"a{seed // 4}") for seed in range(32)]  # noise, which PNG cannot compress
    assert len(page_of(drawn, pictures).encode()) < 1_000_000


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot((0.2126, 0.7152, 0.0722), linear))


PAIRS = [(ink, paper) for paper in ("paper", "lowest-paper") for ink in ("ink", "quiet", "link", "lowest")]
PAIRS += [(f"line-{number}", "paper") for number in range(4)]  # labels have the colour of their line


@pytest.mark.parametrize(("ink", "paper"), [*PAIRS, ("ink", "sheet"), ("flag", "flag-paper"), ("failed", "paper")])
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(ink, paper, scheme):
    css = (Path(inspect.getfile(report)).parent / "templates" / "report.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})\b", re.findall(r":root \{(.*?)\}", css, re.S)[scheme]))
    light, dark = sorted((luminance(colours[ink]), luminance(colours[paper])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


PROBE = """<script>document.documentElement.setAttribute("data-probe", JSON.stringify([
document.documentElement.scrollWidth, innerWidth,
[...document.images].every(i => i.complete && i.naturalWidth > 0)]))</script>"""


def browse(page, folder, scheme, width):
    """The sizes that chromium measures of the page in a frame of that width, and its log."""
    (folder / "page.html").write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", page).replace("</body>", PROBE + "</body>"), "utf-8"
    )
    on_load = 'parent.document.title = document.querySelector("iframe").contentDocument.documentElement.dataset.probe'
    (folder / "frame.html").write_text(
        f'<iframe src="page.html" style="width:{width}px;height:900px;border:0" onload=\'{on_load}\'></iframe>', "utf-8"
    )
    run = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            "--allow-file-access-from-files",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--enable-logging=stderr",
            "--virtual-time-budget=5000",
            "--dump-dom",
            (folder / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(Tree(run.stdout.split("<title>")[1].split("</title>")[0]).text), run.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed; apt-get install chromium")
@pytest.mark.parametrize(("width", "scheme"), [(400, 1), (400, 0), (1200, 1)], ids=["phone", "phone in the dark", "desk"])
def test_nothing_overflows_horizontally(tmp_path, width, scheme):
    flag = {"name": LONG, "why": LONG}
    drawn = [
        record(model=LONG, attack=LONG, data=LONG, threat=LONG, defence=LONG, flags=[flag], notes=[flag]),
        record(model=LONG, goal=LONG, forwards=10**12, backwards=10**12, seconds=1e6, median_size=1e-9),
        record(),
        *(
            record(model=model, attack=attack, threat=f"linf:{eps}/255", robust_accuracy=eps / 16, flags=[flag])
            for model in (LONG, "b" + LONG)
            for attack in (LONG, "pgd")
            for eps in (1, 8, 16)
        ),
    ]
    pictures = [
        picture(*images(), model=LONG, clean_as=LONG, adversarial_as=LONG, label=LONG),
        picture(*images(channels=3, side=300)),
    ]
    page = page_of(drawn, pictures, command=LONG, environment={LONG: LONG})
    assert page.count('<svg class="curve"') == 3
    (scroll_width, inner_width, images_loaded), log = browse(page, tmp_path, scheme, width)
    assert inner_width == width
    assert scroll_width <= inner_width
    assert images_loaded
    assert "CONSOLE" not in log


@pytest.mark.parametrize(("cases", "each"), [(1, 4), (24, 4), (25, 3), (48, 2), (96, 1), (120, 1)])
def test_with_many_cases_each_shows_fewer_pictures(cases, each):
    clean, adversarial = images(side=2)
    names = [f"attack-{number}" for number in range(cases)]
    shown = [picture(clean, adversarial, attack=name, index=i) for name in names for i in range(4)]
    page = page_of([record(attack=name) for name in names], shown)
    assert page.count("<figure>") == cases * each
    assert page.count("image 0, true class") == cases  # the first image of each attack
