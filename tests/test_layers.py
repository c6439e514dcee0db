"""Imports only go down: the layers of the design, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "robustkit"

# From the ground up; names of one line may not import each other, but for the order within the core files given here.
LAYERS = [
    ["_tensors", "_random", "_world", "_behind", "_box", "errors"],
    ["losses"],
    ["threats", "goals", "normalize"],
    ["ledger", "target"],
    ["keep", "audit", "_outputs"],
    ["_layers", "jacobian"],
    ["problem", "result", "adaptive"],
    ["verdict", "_call"],
    ["attack", "defence"],
    ["attacks", "defences"],
    ["_factory", "_npz", "data"],
    ["training"],
    ["zoo", "interop"],
    ["bench", "testing"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SIDEWAYS = {("data", "_factory"), ("data", "_npz")}


def unit(path):
    """The file or folder of the package that a module belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """The parts of robustkit that a module imports, also inside functions; for types alone does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "robustkit":
            below = node.module.split(".")[1:2]
            yield from below or [name.name for name in node.names]


def modules():
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def test_every_module_has_its_layer():
    assert {unit(path) for path in modules()} == set(RANK)


def test_imports_only_go_down():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules()
        for name in imports(path)
        if name != unit(path) and RANK.get(name, -1) >= RANK[unit(path)] and (unit(path), name) not in SIDEWAYS
    ]
    assert not wrong


def test_no_cycle_inside_a_folder():
    edges = {path: set() for path in modules()}
    by_name = {".".join(["robustkit", *path.relative_to(ROOT).with_suffix("").parts]): path for path in edges}
    by_name |= {name.removesuffix(".__init__"): path for name, path in by_name.items()}
    for path in edges:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module in by_name:
                names = [by_name.get(f"{node.module}.{alias.name}", by_name[node.module]) for alias in node.names]
                edges[path] |= {name for name in names if name != path}
    done, trail = set(), []

    def visit(path):
        assert path not in trail, " -> ".join(str(p.relative_to(ROOT)) for p in [*trail, path])
        if path not in done:
            trail.append(path)
            for below in edges[path]:
                visit(below)
            done.add(trail.pop())

    for path in edges:
        visit(path)


def test_third_parties_are_imported_where_they_are_used():
    """What is not a core dependency is imported inside functions; the command line imports torch only when it runs."""
    extras = {"foolbox", "eagerpy", "art", "torchattacks", "pyautoattack", "torchvision", "timm"}
    for path in modules():
        top = {
            name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not top & extras, path
        if unit(path) in ("cli", "__main__"):
            assert top <= {"__future__", "os", "shlex", "sys", "pathlib", "typing", "typer"}, (path, top)
