"""Plugins are listed, run by name and recorded; a broken one is reported in one line and does not affect the others."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from robustkit import PGD, Linf, cli, data, zoo
from robustkit import evaluate as evaluate_
from robustkit.bench.execution.loaded_run import load
from robustkit.bench.plan import model_specs as models
from robustkit.bench.plan import plugins, specs
from robustkit.bench.plan.plan import Case, Plan
from robustkit.errors import ArgumentError

EXAMPLE = Path(__file__).parent / "plugin_example"
PAGE = Path(__file__).parent.parent.parent.parent / "docs" / "adding-an-attack.md"
WORDS = ["bench", "--model", "zoo:digits-mlp", "--data", "digits", "--limit", "40", "--threat", "linf:0.2"]
HEAD = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from robustkit import Linf
from robustkit.attack import Attack
"""
STILL = """
@dataclass(frozen=True)
class Still(Attack):
    length: float = 1.0

    def run(self, problem):
        problem.loss(problem.x)
        return problem.x
"""


def install(site, package, entries, code="", version="1.0"):
    """Write an installed package: its module and its metadata."""
    info = site / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[robustkit.attacks]\n{entries}\n")
    if code:
        (site / f"{package.replace('-', '_')}.py").write_text(HEAD + textwrap.dedent(code))


def pip_install(source, site):
    """Run `pip install` on a folder, without the network."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        source,
    ]
    subprocess.run(pip, check=True, capture_output=True)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Installs packages for the length of a test; their modules are forgotten afterwards."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = set(sys.modules)
    yield lambda package, entries, code="", version="1.0": install(site, package, entries, code, version)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(site) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The example package, built and installed by pip, and one that cannot be imported."""
    made = tmp_path_factory.mktemp("plugins")
    shutil.copytree(EXAMPLE, made / "source")
    pip_install(made / "source", made / "site")
    install(made / "broken", "broken-package", "broken = not_there_at_all:Attack", version="0.3")
    return made


def process(site, *words):
    path = os.pathsep.join(str(site / name) for name in ("site", "broken"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "robustkit", *words], cwd=site, env=environment, capture_output=True, text=True, check=False
    )


def line_of(text, name):
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {name}"))
    return line.strip()


@pytest.mark.slow
def test_the_example_of_the_documentation_works(tmp_path, monkeypatch, capsys):
    page = PAGE.read_text()
    (tmp_path / "pyproject.toml").write_text(re.search(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    (tmp_path / "random_search.py").write_text(re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1])
    pip_install(tmp_path, tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    first, second = (shlex.split(line)[1:] for line in re.findall(r"^robustkit .*", page, re.MULTILINE))
    try:
        assert cli.main(first) == 0
        line = line_of(capsys.readouterr().out, "random-search")
        assert line == "random-search:steps=30,length=0.5  (score; any threat; of robustkit-random-search 1.0)"
        assert cli.main([*second, "--out", "run"]) == 0
    finally:
        sys.modules.pop("random_search", None)
    (record,) = json.loads((tmp_path / "run" / "results.json").read_text())["records"]
    assert record["recipe"] == "RandomSearch(steps=50, length=0.25)"
    assert 0 < record["success_rate"] < 1


@pytest.mark.slow
def test_an_installed_attack_is_listed_and_a_broken_one_is_reported_in_one_line(site):
    done = process(site, "bench", "--list")
    assert done.returncode == 0
    assert done.stderr == (
        "robustkit: plugin 'broken' of package 'broken-package' 0.3 cannot be used: ModuleNotFoundError: No module named "
        "'not_there_at_all'; install what it needs, repair it, or uninstall it\n"
    )
    line = line_of(done.stdout, "random-corner")
    assert line == "random-corner:tries=5,signs=each  (score; linf:EPS; of robustkit-example-attack 1.2)"
    names = [line.strip().partition(":")[0].partition(" ")[0] for line in done.stdout.splitlines()]
    assert names.index("random-corner") == names.index("goals") - 1  # after the attacks of this package
    assert "pgd" in names
    assert "broken" not in done.stdout


@pytest.mark.slow
def test_an_installed_attack_runs_by_name_in_worker_processes(site):
    words = [*WORDS, "--attack", "random-corner:tries=3", "--attack", "fgsm", "--block", "20", "--workers", "2"]
    done = process(site, *words, "--out", "run")
    assert (done.returncode, "broken" in done.stderr) == (0, False), done.stderr
    results = json.loads((site / "run" / "results.json").read_text())
    assert results["environment"]["plugins"] == "robustkit-example-attack 1.2"
    record, _ = results["records"]
    assert record["recipe"] == "RandomCorner(tries=3, signs='each')"
    # The same without the bench, from the class itself.
    script = (
        "import json, sys, torch; from example_attack import RandomCorner; from robustkit import Linf, data, zoo\n"
        "torch.set_num_threads(1); digits = data.load('digits').part(limit=40)\n"
        "result = RandomCorner(tries=3)(zoo.load('digits-mlp'), digits.x, digits.y, threat=Linf(0.2))\n"
        "json.dump([int(result.success.sum()), int(result.forwards.sum())], sys.stdout)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site / "site"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    successes, forwards = json.loads(done.stdout)
    assert 0 < successes < 40
    assert (record["robust_accuracy"], record["forwards"]) == (pytest.approx(1 - successes / 40), forwards)


@pytest.mark.slow
def test_a_broken_attack_is_refused_by_name_with_the_reason(site):
    done = process(site, *WORDS, "--attack", "broken", "--out", "refused")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "robustkit: attack 'broken': plugin 'broken' of package 'broken-package' 0.3 cannot be used: "
    )
    assert "No module named 'not_there_at_all'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (site / "refused").exists()


def test_only_the_code_of_the_requested_attack_runs(publish, tmp_path):
    code = f"with open({str(tmp_path / 'executed')!r}, 'a') as file:\n    file.write('once')\n" + STILL
    publish("lazy", "lazy = lazy:Still", code)
    assert specs.attack("pgd") == PGD()
    with pytest.raises(ArgumentError, match=r"attack 'nope' does not exist; there are fgsm, .*pgd, .*lazy$"):
        specs.attack("nope")
    load(Plan((Case("zoo:digits-mlp", "linf:0.1", "fgsm"),), "digits", limit=2))
    assert not (tmp_path / "executed").exists()
    assert repr(specs.attack("lazy:length=1/2")) == "Still(length=0.5)"
    assert (tmp_path / "executed").read_text() == "once"


BROKEN = {
    "raises": ("raises:Still", "raise ValueError('no \\n luck')", "ValueError: no luck; install what it needs, repair it"),
    "exits": ("exits:Still", "raise SystemExit(3)", "SystemExit: 3"),
    "function": ("function:make", "def make(): return 3", "is not a class derived from Attack; the entry point must name"),
    "instance": ("instance:one", STILL + "one = Still()", r"Still\(length=1.0\) is not a class derived from Attack"),
    "other": ("other:dict", "dict = dict", "<class 'dict'> is not a class derived from Attack"),
    "lacks": ("lacks:Nope", STILL, "AttributeError: .*Nope"),
    "abstract": (
        "abstract:Half",
        "class Half(Attack):\n    pass",
        "Half does not define run; the entry point must name",
    ),
    "bare": ("bare:Bare", "class Bare(Attack):\n    def run(self, problem): return problem.x", "Bare is not a frozen"),
    "thaws": ("thaws:Still", STILL.replace("frozen=True", "frozen=False"), "Still is not a frozen dataclass; the"),
    "sees": ("sees:Still", STILL + "Still.access = 'grey'", "Still.access='grey' must be one of white, score, label"),
    "serve": ("serve:Still", STILL + "Still.serves = Linf", "Still.serves=.* must be a tuple of threats"),
    "types": ("types_:Still", STILL.replace("float", "Float"), "ModuleNotFoundError"),
    "hints": ("hints:Still", STILL.replace("float", "Float"), "NameError: name 'Float' is not defined"),
    "text": ("text", STILL, "'text' must be package.module:Class"),
    "spaces": ("a b c:d", STILL, "'a b c:d' must be package.module:Class"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_any_defect_of_a_plugin_is_reported_in_one_line(publish, capsys, name):
    value, code, reason = BROKEN[name]
    publish(name, f"{name} = {value}", code)
    publish("sound", "sound = sound:Still", STILL)
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    assert line_of(said.out, "sound") == "sound:length=1.0  (white; any threat; of sound 1.0)"
    assert said.err.startswith(f"robustkit: plugin '{name}' of package '{name}' 1.0 cannot be used: ")
    assert said.err.count("\n") == 1
    with pytest.raises(
        ArgumentError, match=f"^attack '{name}': plugin '{name}' of package '{name}' 1.0 cannot be used: .*{reason}"
    ):
        specs.attack(f"{name}:length=3")


@pytest.mark.parametrize("name", ["a b", "a,b", "a+b", "", "-x", "[x]"])
def test_a_name_that_the_command_line_cannot_have_is_refused(publish, capsys, name):
    publish("odd", f"{name} = odd:Still\nfine = odd:Still", STILL)
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    line_of(said.out, "fine")
    assert said.err.count("\n") == 1
    assert f"plugin {name!r} of package 'odd' 1.0 cannot be used: its name may only have letters, digits" in said.err


@pytest.mark.parametrize("name", specs.attack_registry())
def test_a_plugin_cannot_take_the_name_of_an_attack_of_robustkit(publish, capsys, name):
    own = specs.attack(name)
    publish("thief", f"{name} = thief:Still", "raise RuntimeError('never run')")
    assert specs.attack(name) == own
    assert (specs.plugin(name), specs.plugin_packages([name])) == (None, {})
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    assert said.err == (
        f"robustkit: plugin '{name}' of package 'thief' 1.0 cannot be used: robustkit has an attack of this name; "
        "rename the plugin\n"
    )
    assert [line.strip().split(":")[0].split()[0] for line in said.out.splitlines()].count(name) == 1


def test_a_name_that_two_packages_provide_cannot_be_used(publish, capsys):
    publish("second", "same = second:Still", STILL)
    publish("first", "same = first:Still\nalone = first:Still", STILL, "2.0")
    reason = "plugin 'same' of packages 'first' 2.0 and 'second' 1.0 cannot be used: several packages provide this name"
    with pytest.raises(ArgumentError, match=f"^attack 'same': {reason}.*uninstall all but one"):
        specs.attack("same")
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    assert reason in said.err
    assert said.err.count("\n") == 1
    line_of(said.out, "alone")
    with pytest.raises(ArgumentError, match=r"there are .*alone$"):  # without attacks that cannot be used
        specs.attack("nope")


def test_of_a_package_that_is_installed_twice_the_first_is_used(publish, tmp_path, monkeypatch):
    publish("Same.Package", "one = other_place:Still", STILL)
    monkeypatch.syspath_prepend(str(tmp_path / "newer"))
    install(tmp_path / "newer", "same-package", "one = same_package:Still", STILL, "2.0")
    (plugin,) = specs.plugins().values()
    assert (plugin.packages, plugin.problem) == ((("same-package", "2.0"),), "")
    assert issubclass(plugin.load(), plugins.Attack)


def test_unreadable_metadata_do_not_hide_other_packages(publish, tmp_path, capsys):
    publish("torn", "no value at all")
    publish("sound", "sound = sound:Still", STILL)
    (tmp_path / "site" / "left-0.0.dist-info").mkdir()  # as an interrupted installation leaves it
    (tmp_path / "site" / "left-0.0.dist-info" / "entry_points.txt").write_text("[robustkit.attacks]\nx = y:Z\n")
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    line_of(said.out, "sound")
    assert "plugin '*' of package 'torn' 1.0 cannot be used: its entry_points.txt cannot be read" in said.err
    assert repr(specs.attack("sound")) == "Still(length=1.0)"


RAISES = STILL.replace("        return problem.x", "        return {}[self.length]")


def test_an_error_in_a_plugin_is_reported_in_one_line(publish, tmp_path, capsys, monkeypatch):
    publish("faulty", "faulty = faulty:Still", RAISES)
    words = [*WORDS, "--attack", "faulty", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == (
        "robustkit: attack 'faulty': plugin 'faulty' of package 'faulty' 1.0 raised KeyError: 1.0; report it to its authors; "
        "--debug, with one worker, shows where"
    )
    assert "Traceback" not in said
    with pytest.raises(ArgumentError) as caught:
        cli.main([*words[:-1], str(tmp_path / "again"), "--debug"])
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_in_the_constructor_or_the_check_of_a_plugin_is_reported(publish, tmp_path, capsys):
    code = STILL + "\n    def __post_init__(self):\n        1 / self.length\n\n    def check(self, threat):\n        [][3]\n"
    publish("faulty", "faulty = faulty:Still", code)
    with pytest.raises(ArgumentError, match=r"attack 'faulty:length=0': plugin 'faulty' of .* raised ZeroDivisionError: float"):
        specs.attack("faulty:length=0")
    assert cli.main([*WORDS, "--attack", "faulty", "--out", str(tmp_path / "run")]) == 2
    assert "plugin 'faulty' of package 'faulty' 1.0 raised IndexError" in capsys.readouterr().err


def test_an_error_of_the_model_is_not_attributed_to_the_attack(publish, use):
    class Late(torch.nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise ValueError("the model is late")
            return torch.eye(10)[[0] * len(x)]  # correct for digit 0 alone

    use(Late())
    code = STILL.replace("problem.loss(problem.x)", "problem.loss_and_grad(problem.x)") + "\n    access: ClassVar = 'score'"
    publish("gentle", "gentle = gentle:Still", code)
    loaded = load(Plan((Case("late", "linf:0.1", "gentle"),), "digits", limit=40))
    with pytest.raises(ArgumentError, match=r"^model 'late' raised ValueError.*the model is late"):
        loaded.measure(loaded.tasks()[0])


def test_running_out_of_memory_is_not_attributed_to_the_attack():
    plugin = plugins.Plugin("x", (("y", "1"),), None)
    with pytest.raises(torch.OutOfMemoryError), plugins.attribute_errors(plugin, "x"):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(KeyError), plugins.attribute_errors(None, "pgd"):
        raise KeyError("a defect of robustkit")


def test_errors_pass_unchanged_in_python(publish):
    publish("faulty", "faulty = faulty:Still", RAISES)
    digits = data.load("digits").part(limit=3)
    for attack in ("faulty", specs.attack("faulty")):
        with pytest.raises(KeyError):
            evaluate_(zoo.load("digits-mlp"), (digits.x, digits.y), threat=Linf(0.1), attacks=attack)


def test_the_environment_names_the_packages_that_are_used(publish):
    publish("sound", "sound = sound:Still\nsecond = sound:Still", STILL)
    plans = [
        Plan(tuple(Case("zoo:digits-mlp", "linf:0.1", word) for word in words), "digits", limit=2)
        for words in (("sound", "second:length=2", "pgd"), ("sound", "second:length=2", "pgd"), ("pgd",))
    ]
    first, second, without = map(load, plans)
    assert first.environment["plugins"] == "sound 1.0"
    assert first.environment == second.environment == {**without.environment, "plugins": "sound 1.0"}
    assert [task.name for task in first.tasks()] == [task.name for task in second.tasks()]


def test_a_run_is_not_resumed_with_another_version(publish, tmp_path, capsys):
    publish("sound", "sound = sound:Still", STILL)
    words = [*WORDS, "--limit", "3", "--attack", "sound", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    (tmp_path / "site" / "sound-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sound\nVersion: 1.1\n")
    assert cli.main([*words, "--resume"]) == 2
    assert "plugins was sound 1.0, is sound 1.1" in capsys.readouterr().err


def test_what_a_package_prints_goes_to_standard_error(publish, capsys):
    publish("loud", "loud = loud:Still", "print('hello')" + STILL)
    assert cli.main(["bench", "--list"]) == 0
    said = capsys.readouterr()
    assert ("hello" in said.out, "hello" in said.err) == (False, True)


def test_listed_specs_can_be_copied(capsys):
    """The spec of an attack as it is listed, with its fields, is equal to its name alone."""
    assert cli.main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("attacks") + 1 : lines.index("goals")]]
    assert [specs.attack(line) for line in listed] == [specs.attack(name) for name in specs.attack_registry()]
    assert models.FORMS[1] in " ".join(lines)
