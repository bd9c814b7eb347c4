"""Imports run one way, and other libraries are known in one place each.

Read from the source, so that an import inside a function or under ``TYPE_CHECKING`` counts too.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A module belongs to the longest name here that it is or lies in; it may import its own
# layer and those above it in this list. A package's own name stands for its __init__ and the rest of it.
LAYERS = (
    (
        "twnn_plugin.errors",
        "twnn_plugin.types",
        "twnn_plugin.trees",
        "twnn_plugin.modes",
        "twnn_plugin.transforms",
    ),
    ("twnn_plugin.kernels",),
    ("twnn_plugin.registry", "twnn_plugin.hookspecs"),
    ("twnn_plugin.state",),
    ("twnn_plugin.solvers.base", "twnn_plugin.solvers.memory"),
    ("twnn_plugin.solvers.hosting",),
    ("twnn_plugin.solvers.measure", "twnn_plugin.solvers.axpy", "twnn_plugin.solvers.joint"),
    ("twnn_plugin.solvers.units",),
    ("twnn_plugin.solvers.book",),
    ("twnn_plugin.solvers.book_rows",),
    ("twnn_plugin.solvers.masked",),
    ("twnn_plugin.solvers.graphs",),
    ("twnn_plugin.solvers.driver",),
    ("twnn_plugin.solvers.linear",),
    ("twnn_plugin.solvers",),
    ("twnn_plugin.adjoints",),
    ("twnn_plugin.observe",),
    ("twnn_plugin.fixed_point",),
    ("twnn_plugin.constraints", "twnn_plugin.certificates"),
    ("twnn_plugin.regularise",),
    ("twnn_plugin.testing",),
    ("twnn_plugin.gates",),
    ("twnn_plugin.blocks",),
    ("twnn_plugin.policies",),
    ("twnn_plugin.selection",),
    ("twnn_plugin.sequence",),
    ("twnn_plugin.backbones",),
    ("twnn_plugin.streaming",),
    ("twnn_plugin.builtins",),
    ("twnn_plugin.plugins",),
    ("twnn_plugin",),
    ("zoo",),
    ("benchmarks",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Which file of twnn_plugin may import which other library (beside the standard library).
EVERYWHERE = {"torch", "pluggy"}
ONLY_IN = {
    "torchdeq": "twnn_plugin/solvers/torchdeq_bridge.py",
    "timm": "twnn_plugin/backbones/timm_adapter.py",
}


def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in ("twnn_plugin", "zoo", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
OURS = {name.split(".")[0] for name in LEVEL}


def imports(name: str, source: str, known: set[str], is_package: bool) -> list[tuple[int, str]]:
    """Line and absolute name of each module that a module imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                keep = len(parts) - node.level + is_package
                base = ".".join([*parts[:keep], *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.append((node.lineno, deeper if deeper in known else base))
    return found


def imports_of(name: str) -> list[tuple[int, str]]:
    path = MODULES[name]
    return imports(name, path.read_text(encoding="utf-8"), set(MODULES), path.name == "__init__.py")


def layer(name: str) -> str:
    """The longest entry of LAYERS that a module is or lies in."""
    while name not in LEVEL:
        name = name.rpartition(".")[0]
    return name


def violations(name: str, found: list[tuple[int, str]]) -> list[str]:
    """The imports that run against the order, each as a line of text."""
    mine = layer(name)
    return [
        f"{name}:{line} imports {target}, but {mine} is below {layer(target)}"
        for line, target in found
        if target.split(".")[0] in OURS and LEVEL[layer(target)] > LEVEL[mine]
    ]


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name):
    assert violations(name, imports_of(name)) == []


def test_every_module_of_the_plugin_has_a_layer_of_its_own():
    strays = [name for name in MODULES if layer(name) == "twnn_plugin" and name != "twnn_plugin"]
    assert strays == [], "give these a place in LAYERS"


def test_no_import_cycles():
    graph = {name: {target for _, target in imports_of(name) if target in MODULES} for name in MODULES}
    for name, targets in graph.items():
        targets -= {name}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] == "twnn_plugin"])
def test_other_libraries_are_known_in_one_place(name):
    path = MODULES[name].relative_to(ROOT).as_posix()
    for line, target in imports_of(name):
        library = target.split(".")[0]
        if library in sys.stdlib_module_names or library in OURS or library in EVERYWHERE:
            continue
        assert library in ONLY_IN, f"{path}:{line} imports {library}"
        assert path == ONLY_IN[library], f"{path}:{line} imports {library}; only {ONLY_IN[library]} may"


def test_the_wheel_never_imports_what_it_does_not_install():
    for name in MODULES:
        if name.split(".")[0] != "benchmarks":
            outside = [t for _, t in imports_of(name) if t.split(".")[0] in ("benchmarks", "tests")]
            assert outside == []


# The checks above are only as good as these two functions.
@pytest.mark.parametrize(
    "name, is_package, source, target",
    [
        ("twnn_plugin.solvers.anderson", False, "from .base import Solver", "twnn_plugin.solvers.base"),
        ("twnn_plugin.solvers.anderson", False, "from . import base", "twnn_plugin.solvers.base"),
        ("twnn_plugin.solvers.anderson", False, "from . import registry", "twnn_plugin.solvers"),
        ("twnn_plugin.solvers", True, "from .base import Solver", "twnn_plugin.solvers.base"),
        ("twnn_plugin.solvers", True, "from ..registry import Registry", "twnn_plugin.registry"),
        ("twnn_plugin.fixed_point", False, "from . import solvers", "twnn_plugin.solvers"),
        ("twnn_plugin.fixed_point", False, "from twnn_plugin import hookimpl", "twnn_plugin"),
        ("zoo.cli", False, "import twnn_plugin.registry as r", "twnn_plugin.registry"),
        ("zoo.cli", False, "def f():\n    from timm.models import create_model", "timm.models"),
    ],
)
def test_imports_are_resolved(name, is_package, source, target):
    known = {
        "twnn_plugin",
        "twnn_plugin.registry",
        "twnn_plugin.solvers",
        "twnn_plugin.solvers.base",
    }
    assert [found for _, found in imports(name, source, known, is_package)] == [target]


@pytest.mark.parametrize(
    "name, target, allowed",
    [
        ("twnn_plugin.solvers.anderson", "twnn_plugin.solvers.base", True),
        ("twnn_plugin.solvers.anderson", "twnn_plugin.solvers", True),
        ("twnn_plugin.solvers.anderson", "twnn_plugin.adjoints.implicit", False),
        ("twnn_plugin.solvers.base", "twnn_plugin.solvers.driver", False),
        ("twnn_plugin.adjoints.implicit", "twnn_plugin.solvers.anderson", True),
        ("twnn_plugin.registry", "twnn_plugin", False),
        ("twnn_plugin", "zoo.cli", False),
        ("zoo.cli", "twnn_plugin", True),
        ("zoo.cli", "benchmarks.speed", False),
        ("benchmarks.speed", "zoo.cli", True),
    ],
)
def test_the_order_is_what_it_should_be(name, target, allowed):
    assert (violations(name, [(1, target)]) == []) is allowed
