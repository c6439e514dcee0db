"""Imports only go down: the layers of the design, read from the source."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "robustkit"

# From the ground up. A line holds modules that do not know each other; a folder that is named as a whole, ending in a dot,
# stands for its files, which may import each other without a cycle.
LAYERS = [
    ["errors", "_engine", "_engine.tensors", "_engine.noise", "_engine.state_guard", "_engine.introspection", "_engine.schema"],
    [
        "_engine.gradients",
        "_engine.field_checks",
        "_engine.factory",
        "_engine.npz",
        "_engine.layers",
        "_engine.jacobian",
        "losses",
        "threats._box",
    ],
    ["threats.threat", "goals.goal", "normalize"],
    ["threats.linf", "threats.l2", "threats.l1", "threats.pixels", "goals.classification"],
    ["threats", "goals"],
    ["_engine.ledger", "target"],
    ["_engine.best_so_far", "_engine.output_checks", "flags"],
    ["problem", "result", "adaptive"],
    ["_engine.call", "_engine.verdict"],
    ["attack", "defence"],
    # Attacks: what several of them share, then the papers, then what is made of other attacks.
    ["attacks._boundary", "attacks._descent", "attacks._hyperplane", "attacks._max_threat", "attacks._square_patches"],
    ["attacks._fmn", "attacks._restarted_attack"],
    [
        "attacks.fgsm",
        "attacks.pgd",
        "attacks.mifgsm",
        "attacks.apgd",
        "attacks.l1_apgd",
        "attacks.fmn",
        "attacks.fab",
        "attacks.deepfool",
        "attacks.square",
        "attacks.rays",
        "attacks.pixels.",
    ],
    ["attacks.universal."],
    ["attacks.standard.patch_search"],
    ["attacks.standard.cascade"],
    ["attacks.standard.substitute", "attacks.standard.gradient_checks"],
    ["attacks.standard.attack_checks", "attacks.standard.escalation"],
    ["attacks.standard.audit"],
    ["attacks.standard.standard"],
    ["attacks.standard"],
    ["attacks"],
    ["defences.", "data"],
    ["training."],
    ["zoo.", "interop."],
    # The bench, a room a line.
    ["bench.statistics."],
    ["bench.plan."],
    ["bench.results."],
    ["bench.execution."],
    ["bench.comparison."],
    ["bench.reporting."],
    ["bench.run_folder"],
    ["bench.evaluate"],
    ["bench"],
    ["testing."],
    ["commands."],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module(path):
    """The dotted name of a file below the package; a folder's own for its `__init__`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def unit(name):
    """The entry of LAYERS that a module belongs to."""
    parts = name.split(".")
    folders = [".".join(parts[:depth]) + "." for depth in range(len(parts), 0, -1)]
    return next((entry for entry in (name, *folders) if entry in RANK), None)


def imports(path):
    """The modules of robustkit that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "robustkit":
            base = node.module.split(".")[1:]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in MODULES else ".".join(base)


PATHS = {module(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}
MODULES = set(PATHS)


def test_every_module_has_its_layer_and_every_entry_a_module():
    units = {name: unit(name) for name in MODULES}
    assert not [name for name, entry in units.items() if entry is None]
    assert set(RANK) == set(units.values())


def test_imports_only_go_down():
    wrong = [
        f"{name} imports {below}"
        for name, path in PATHS.items()
        for below in imports(path)
        if below and unit(below) != unit(name) and RANK[unit(below)] >= RANK[unit(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_cycle():
    edges = {name: set(imports(path)) - {name, ""} for name, path in PATHS.items()}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            trail.append(name)
            for below in edges[name]:
                visit(below)
            done.add(trail.pop())

    for name in edges:
        visit(name)


def test_third_parties_are_imported_where_they_are_used():
    """What is not a core dependency is imported inside functions; the command line imports torch only when it runs."""
    extras = {"foolbox", "eagerpy", "art", "torchattacks", "pyautoattack", "torchvision", "timm"}
    for name, path in PATHS.items():
        top = {
            imported.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for imported in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert not top & extras, path
        if name in ("cli", "__main__"):
            assert top <= {"__future__", "os", "shlex", "sys", "pathlib", "typing", "typer"}, (path, top)
