"""The pages build without a warning, load nothing from other hosts, and tell of every public name."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import robustkit

REPO = Path(__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers")
ABSENT = [name for name in NEEDED if importlib.util.find_spec(name) is None]
ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
FETCHED = re.compile(r"(?:url\(|@import)\s*(?:url\()?\s*[\"']?\s*(?:https?:)?//", re.IGNORECASE)  # in CSS


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built pages."""
    if ABSENT:
        pytest.skip(f"{', '.join(ABSENT)} is not installed: pip install 'robustkit[docs]'")
    built = tmp_path_factory.mktemp("site")
    # Not --quiet: it would hide the warnings from --strict too.
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=REPO, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return built


class Loads(HTMLParser):
    """Everything that a browser fetches by itself when it opens a page; links that a reader may follow are none of it."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = {name: value or "" for name, value in attrs}
        followed = tag == "a" or (tag == "link" and named.get("rel") in ("canonical", "next", "prev"))
        urls = [] if followed else [named.get(name, "") for name in ("src", "srcset", "data", "poster", "href")]
        self.found += [url for url in urls if ELSEWHERE.match(url)] + FETCHED.findall(named.get("style", ""))


def foreign(page):
    """What a page fetches from other hosts."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".css":
        return FETCHED.findall(text)
    return Loads(text).found + [css for css in re.findall(r"<style.*?</style>", text, re.DOTALL) if FETCHED.search(css)]


def test_pages_load_nothing_from_other_hosts(site):
    pages = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len([path for path in pages if path.suffix == ".html"]) >= 15
    assert not {str(path.relative_to(site)): foreign(path) for path in pages if foreign(path)}


@pytest.mark.parametrize(
    ("suffix", "text", "count"),
    [
        (".html", '<script src="https://example.org/a.js"></script>', 1),
        (".html", '<link rel="stylesheet" href="//example.org/a.css">', 1),
        (".html", '<link rel="preconnect" href="https://example.org">', 1),
        (".html", '<img alt="" src="HTTP://example.org/a.png">', 1),
        (".html", "<style>@font-face { src: url('https://example.org/a.woff2') }</style>", 1),
        (".html", '<p style="background: url(//example.org/a.png)">', 1),
        (".css", '@import "https://example.org/a.css";', 1),
        (".css", "@font-face { src: url(https://example.org/a.woff2) }", 1),
        (".html", '<a href="https://example.org">read</a><img src="a.png"><script src="a.js"></script>', 0),
        (".css", "/* https://example.org */ p { background: url(data:image/png;base64,//8=) }", 0),
    ],
)
def test_what_counts_as_loading(tmp_path, suffix, text, count):
    page = tmp_path / f"page{suffix}"
    page.write_text(text)
    assert len(foreign(page)) == count


@pytest.mark.parametrize("name", robustkit.__all__)
def test_every_public_name_stands_on_an_api_page(site, name):
    anchor = re.compile(rf'id="robustkit(?:\.\w+)*\.{name}"')
    assert [page for page in (site / "api").glob("*.html") if anchor.search(page.read_text(encoding="utf-8"))]


def test_docstrings_keep_their_sections(site):
    """Args, Returns and Raises are read as such, not as prose."""
    core = (site / "api" / "core.html").read_text(encoding="utf-8")
    for title in ("Parameters:", "Returns:", "Raises:", "Attributes:"):
        assert title in core
    left = {page.name: re.findall(r"<p>(?:Args|Returns|Raises|Attributes):", page.read_text()) for page in site.rglob("*.html")}
    assert not {name: found for name, found in left.items() if found}


def citation():
    """The top level of CITATION.cff that is one word or line a key."""
    text = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    return {key: value.strip().strip("\"'") for key, value in re.findall(r"^([a-z-]+):[ ]+(.+)$", text, re.MULTILINE)}


def test_the_citation_names_this_version():
    metadata = citation()
    assert metadata["version"] == robustkit.__version__
    assert metadata["cff-version"] == "1.2.0"
    assert metadata["license"] == "Apache-2.0"
    assert metadata["title"] == "robustkit"
    assert metadata["message"]


def test_the_citation_is_yaml():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed: pip install 'robustkit[docs]'")
    metadata = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert metadata["version"] == robustkit.__version__
    assert metadata["authors"] == [{"name": "The robustkit authors"}]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_top_pages_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#\s]+)", (REPO / name).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (REPO / target).exists(), target
