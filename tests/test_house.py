"""The budgets of the design, measured on the source."""

import ast
import importlib
import inspect
import statistics
from pathlib import Path

import pytest

import robustkit

REPO = Path(__file__).parent.parent
ROOT = REPO / "robustkit"
FILES = {path: path.read_text() for path in sorted(ROOT.rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
NODES = [(path, node) for path, tree in TREES.items() for node in ast.walk(tree)]
FUNCTIONS = [(path, node) for path, node in NODES if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def where(path, node):
    return f"{path.relative_to(REPO)}:{node.lineno} {node.name}"


def length(function):
    """Lines of the body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) and len(function.body) > 1 else function.body
    return body[-1].end_lineno - body[0].lineno + 1


def arguments(function):
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a for a in every if a.arg not in ("self", "cls")]


def is_command(function):
    """Options of the command line are arguments of the function that typer calls; there they may be as many as needed."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_files_are_short():
    lines = {path: text.count("\n") for path, text in FILES.items()}
    assert max(lines.values()) <= 500, max(lines, key=lines.get)
    assert statistics.median(lines.values()) <= 150


def test_functions_are_short():
    lengths = {where(path, f): length(f) for path, f in FUNCTIONS}
    assert max(lengths.values()) <= 60, max(lengths, key=lengths.get)
    assert sum(size <= 25 for size in lengths.values()) >= 0.9 * len(lengths)


def test_functions_take_few_arguments():
    """But for commands, and the one call by which every attack is run, whose arguments are what an evaluation is."""
    free = [f for _, f in FUNCTIONS if is_command(f) or f.name == "__call__"]
    many = {where(p, f): len(arguments(f)) for p, f in FUNCTIONS if len(arguments(f)) > 8 and f not in free}
    assert not many


def test_hardly_any_keyword_dictionaries():
    loose = [where(path, f) for path, f in FUNCTIONS if f.args.kwarg]
    assert len(loose) <= 0.03 * len(FUNCTIONS), loose


def test_everything_is_annotated():
    bare = [where(path, f) for path, f in FUNCTIONS if f.returns is None or any(a.annotation is None for a in arguments(f))]
    assert not bare


def test_public_things_are_documented_and_modules_say_what_they_are_for():
    bare = [str(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    holders = [(p, h) for p, tree in TREES.items() for h in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]]
    for path, holder in holders:
        for node in holder.body:
            public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            hidden = isinstance(holder, ast.ClassDef) and holder.name.startswith("_")
            if public and not hidden and not ast.get_docstring(node):
                bare.append(where(path, node))
    assert not bare


def test_no_global_state():
    """No `global`, and no module-level container that a function could fill: tables are tuples, or dicts never written to."""
    for path, node in NODES:
        assert not isinstance(node, ast.Global), path
    for path, tree in TREES.items():
        tables = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Set)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name) and target.id != "__all__"
        }
        for node in ast.walk(tree):
            written = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
            called = isinstance(node, ast.Attribute) and node.attr in ("append", "update", "add", "setdefault", "pop", "extend")
            if (written or called) and isinstance(node.value, ast.Name):
                assert node.value.id not in tables, where_name(path, node)


def where_name(path, node):
    return f"{path.relative_to(REPO)}:{node.lineno}"


def classes():
    for path in FILES:
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__main__.py":
            for value in vars(importlib.import_module(name)).values():
                if inspect.isclass(value) and value.__module__ == name:
                    yield value


def test_classes_are_abstract_or_final_and_not_deep():
    ours = list(classes())
    for cls in ours:
        lineage = [c for c in cls.__mro__ if c.__module__.startswith("robustkit")]
        assert len(lineage) <= 3, lineage
        children = [c for c in ours if c is not cls and issubclass(c, cls)]
        if children and not issubclass(cls, BaseException):
            assert inspect.isabstract(cls), f"{cls} is concrete and has children {children}"


def test_every_public_name_is_importable_from_its_module():
    names_of_modules = [name for names in robustkit._MODULES.values() for name in names]
    assert sorted(names_of_modules) == sorted(robustkit.__all__)
    for name in robustkit.__all__:
        assert getattr(robustkit, name).__module__.startswith("robustkit.")
    assert set(robustkit.__all__) < set(dir(robustkit))
    for path, tree in TREES.items():
        if path.name not in ("__main__.py",):
            names = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
            assert "__all__" in names or not [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)], path


@pytest.mark.slow
def test_there_is_as_much_test_as_code():
    def lines(folder):
        """Statements, written out one way, without comments and docstrings."""
        return sum(ast.unparse(strip(ast.parse(path.read_text()))).count("\n") for path in folder.rglob("*.py"))

    assert lines(REPO / "tests") >= lines(ROOT)


def test_no_attack_knows_what_targeted_means():
    """Labels, norms, bounds and modes live in the goal, the threat and the target; an attack never asks."""
    words = ("targeted", "labels", "bounds", ".eps", ".training", "isinstance", "no_grad", "clamp(0")
    for path in (ROOT / "attacks").glob("*.py"):
        code = "\n".join(ast.unparse(node) for node in strip(TREES[path]).body)
        if not path.name.startswith("_"):
            assert not [word for word in words if word in code], path


def strip(tree):
    """The tree without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_the_listing_is_the_design():
    top = {path.name for path in REPO.iterdir() if not path.name.startswith(".")}
    for name in (
        "pyproject.toml",
        "README.md",
        "Makefile",
        "CHANGELOG.md",
        "LICENSE",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CITATION.cff",
        "mkdocs.yml",
        "robustkit",
        "benchmarks",
        "tests",
        "docs",
    ):
        assert name in top, name


def test_the_version_is_told_once():
    pyproject = (REPO / "pyproject.toml").read_text()
    assert f'version = "{robustkit.__version__}"' in pyproject
