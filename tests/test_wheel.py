"""The built wheel works outside the tree: weights, templates and types are inside."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the contents of the wheel, and a way to run Python on it from elsewhere."""
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("site packages")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tree)
    shutil.copytree(REPO / "robustkit", tree / "robustkit", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "dist", tree]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tree / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    shutil.rmtree(tree)
    return folder


def python(folder, *words):
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder.parent, env=environment, capture_output=True, text=True, check=False
    )


def test_it_holds_what_is_not_python(installed):
    package = installed / "robustkit"
    shipped = [path.relative_to(REPO / "robustkit") for path in (REPO / "robustkit").rglob("*") if path.is_file()]
    assert {str(p) for p in shipped if "__pycache__" not in p.parts} == {
        str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()
    }
    assert (package / "py.typed").exists()
    assert list((package / "zoo" / "weights").glob("*.safetensors"))
    assert all(path.stat().st_size < 1_500_000 for path in (package / "zoo" / "weights").iterdir())


@pytest.mark.slow
def test_it_runs_outside_the_tree(installed):
    where = python(installed, "-c", "import robustkit; print(robustkit.__file__)")
    assert where.stdout.startswith(str(installed))
    assert python(installed, "-m", "robustkit", "--version").stdout.startswith("robustkit 0.")
    words = ("--limit", "10", "--attack", "pgd:steps=5", "--out", "a run")
    done = python(installed, "-m", "robustkit", "bench", *words)
    assert done.returncode == 0, done.stderr
    records = json.loads((installed.parent / "a run" / "results.json").read_text())["records"]
    assert {record["model"] for record in records} == {"zoo:mnist-cnn", "zoo:mnist-cnn-robust"}
    assert (installed.parent / "a run" / "report.html").stat().st_size > 5_000


@pytest.mark.slow
def test_a_missing_extra_is_named_with_its_install_line(installed):
    hide = "import sys; sys.modules['foolbox'] = None\nfrom robustkit.interop.foolbox import from_foolbox\nfrom_foolbox(None)"
    found = python(installed, "-c", hide)
    assert found.returncode != 0
    assert "pip install 'robustkit[foolbox]'" in found.stderr
