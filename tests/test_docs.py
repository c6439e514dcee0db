"""What the pages show runs, and what they link to exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from robustkit import cli

REPO = Path(__file__).parent.parent
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), *sorted((REPO / "benchmarks").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path):
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_command_lines_of_the_pages_are_understood(tmp_path, monkeypatch, capsys):
    """Every `robustkit ...` line: its options exist (it is run on a folder where the files that it names are missing)."""
    monkeypatch.chdir(tmp_path)
    lines = [line for page in PAGES for block in blocks(page, "sh") for line in block.splitlines()]
    ours = [line.partition("#")[0].split()[1:] for line in lines if line.startswith("robustkit ")]
    assert ours
    for words in ours:
        typo = [*words, "--no-such-option"]
        assert cli.main(typo) == 2
        assert "No such option: --no-such-option" in capsys.readouterr().err


def test_make_knows_what_the_pages_tell_people_to_type():
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for block in blocks(page, "sh"):
            for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
                assert target in targets, (page, target)
