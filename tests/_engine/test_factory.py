"""Functions named by file or module, and the errors of wrong names."""

import dataclasses
import pickle
import sys

import pytest

from robustkit._engine.factory import load_factory
from robustkit.errors import ArgumentError


@pytest.fixture(autouse=True)
def _clean():
    """Remove the modules that a test imports."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_of_an_installed_module_is_found():
    assert load_factory("collections:OrderedDict")() == {}


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "only_here").mkdir()
    (tmp_path / "only_here" / "__init__.py").write_text("")
    (tmp_path / "only_here" / "inner.py").write_text("def seven():\n    return 7\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_factory("only_here.inner:seven")() == 7
    assert sys.path == before


def test_files_of_equal_names_do_not_collide(tmp_path):
    functions = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.py").write_text(f"class Number:\n    value = {number}\n")
        functions.append(load_factory(f"{tmp_path}/{number}/model.py:Number"))
    numbers = [function() for function in functions]
    assert [number.value for number in numbers] == [1, 2]
    assert [number.value for number in pickle.loads(pickle.dumps(numbers))] == [1, 2]


def test_a_file_may_define_dataclasses(tmp_path):
    (tmp_path / "m.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass Point:\n    x: int = 3\n"
    )
    assert dataclasses.asdict(load_factory(f"{tmp_path}/m.py:Point")()) == {"x": 3}


# Errors after the import: the module stays in sys.modules.
AFTER_IMPORT = (
    "has no function made",
    "has no function made; it has other",
    "raised ZeroDivisionError",
    "raised TypeError",
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise ValueError('two\\nlines')", "importing .* raised ValueError: two lines"),
        ("import sys\nsys.exit(3)", "raised SystemExit: 3"),
        ("def broken(:", "raised SyntaxError"),
        ("import no_such_module_anywhere", "raised ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("made = 3", "has no function made"),
        ("def other(): ...", "has no function made; it has other"),
        ("def made(): return 1 / 0", "raised ZeroDivisionError"),
        ("def made(needed): ...", "raised TypeError"),
    ],
)
def test_errors_of_a_file_are_reported_in_one_line(content, message, tmp_path):
    (tmp_path / "m.py").write_text(content)
    before = set(sys.modules)  # other test files leave modules behind
    with pytest.raises(ArgumentError, match=message) as caught:
        load_factory(f"{tmp_path}/m.py:made")()
    assert "\n" not in str(caught.value)
    imported = [name for name in set(sys.modules) - before if name.startswith("m_")]
    assert bool(imported) == (message in AFTER_IMPORT), "a module is removed if and only if its import failed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py:made", "there is no file none.py"),
        ("no_such_package:made", "there is no module no_such_package;"),
        ("collections.no_such_part:made", "there is no module collections.no_such_part;"),
        ("collections:none", "has no function none"),
        ("collections", "must be path/to/file.py:name"),
        (":made", "must be path/to/file.py:name"),
        ("collections:not a name", "must be path/to/file.py:name"),
    ],
)
def test_a_wrong_spec_is_refused_by_name(spec, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        load_factory(spec)
    assert repr(spec) in str(caught.value)
