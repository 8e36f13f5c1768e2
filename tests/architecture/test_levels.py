"""Dependencies point one way, down the levels of DESIGN.md; the imports are read from the source, nothing is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hesscope as hs

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = "hesscope"

LEVELS = {
    "core": 0,
    **dict.fromkeys(("objective", "partition", "theory", "bounds", "data", "models"), 1),
    "operators": 2,
    "estimate": 3,
    **dict.fromkeys(("layerwise", "dynamics"), 4),
    **dict.fromkeys(("study", "report"), 5),
    "cli": 6,
}
# Modules at the top: the table of contents may import every room, everyone may import the version and nothing else.
TOP = {PACKAGE, f"{PACKAGE}._version", f"{PACKAGE}.__main__"}
EVERYBODYS = f"{PACKAGE}._version"

# Levels 0-4 must run on a bare GPU image.
BARE_LEVELS = range(5)
BARE_LIBRARIES = {"torch", "numpy", "scipy"}

# The report reads records, never a model.
FORBIDDEN = {"report": {"study", "objective", "operators"}}


@dataclass(frozen=True)
class Import:
    """Module `importer` imports `target`; eager if that happens as soon as the importer is loaded."""

    importer: str
    target: str
    eager: bool


def modules_of(source):
    """Dotted name -> file of every module of the package under `source`."""
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source):
    """Every import statement of the package, with names resolved to modules where they are modules."""
    modules = modules_of(source)
    found = []
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, eager in statements(ast.parse(path.read_text()), eager=True):
            found += [Import(name, target, eager) for target in targets(node, package, modules) if target != name]
    return found


def statements(tree, eager):
    """Import statements with whether they run at import time: not inside functions, nor for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, eager
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from statements(ast.Module(node.body, []), eager=False)
            yield from statements(ast.Module(node.orelse, []), eager)
        else:
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from statements(node, eager and not is_function)


def targets(node, package, modules):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, base] if base else above)
    joined = [f"{base}.{alias.name}" for alias in node.names]
    return [module if module in modules else base for module in joined]


def room(module):
    return module.split(".")[1] if module.startswith(f"{PACKAGE}.") else module


def is_ours(module):
    return module == PACKAGE or module.startswith(f"{PACKAGE}.")


def edges_between_rooms(imports):
    for edge in imports:
        counts = is_ours(edge.target) and edge.target != EVERYBODYS and edge.importer not in TOP
        if counts and room(edge.importer) != room(edge.target):
            yield edge


def violations(imports):
    """Upward and sideways edges, in words."""
    found = []
    for edge in edges_between_rooms(imports):
        here, there = room(edge.importer), room(edge.target)
        level = LEVELS.get(there, len(LEVELS))  # the table of contents itself is above everything
        if level >= LEVELS[here] or there in FORBIDDEN.get(here, ()):
            found.append(f"{edge.importer} (level {LEVELS[here]}) imports {edge.target} (level {level})")
    return sorted(set(found))


def cycle_in(imports, name):
    """A cycle among the modules of one room; the room's own __init__ is its table of contents, not a member."""
    graph = {}
    for edge in imports:
        if room(edge.importer) == room(edge.target) == name and f"{PACKAGE}.{name}" not in (edge.importer, edge.target):
            graph.setdefault(edge.importer, set()).add(edge.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def not_bare(imports):
    """Imports at module level of levels 0-4 that a bare image does not have."""
    bare = BARE_LIBRARIES | set(sys.stdlib_module_names)
    return sorted(
        f"{edge.importer} imports {edge.target}"
        for edge in imports
        if edge.importer not in TOP and edge.eager and LEVELS[room(edge.importer)] in BARE_LEVELS
        if not is_ours(edge.target) and edge.target.split(".")[0] not in bare
    )


@pytest.fixture(scope="module")
def imports():
    return imports_of(SOURCE)


def test_every_room_has_a_level():
    rooms = {room(module) for module in modules_of(SOURCE) if module not in TOP}
    assert rooms <= set(LEVELS)
    assert {"core", "objective", "partition", "operators", "estimate"} <= rooms


def test_no_edge_points_up_or_sideways(imports):
    assert violations(imports) == []


@pytest.mark.parametrize("name", LEVELS)
def test_no_cycle_within_a_room(imports, name):
    assert cycle_in(imports, name) is None


def test_the_lower_levels_need_torch_numpy_and_scipy_only(imports):
    assert not_bare(imports) == []


def test_the_checker_reads_the_source(imports):
    """Some edges that certainly exist, of every form."""
    assert Import(f"{PACKAGE}.operators.curvature", f"{PACKAGE}.objective.objective", eager=True) in imports
    assert Import(f"{PACKAGE}.partition.partition", f"{PACKAGE}.partition.schemes", eager=True) in imports
    assert Import(f"{PACKAGE}.estimate.energies", "xarray", eager=False) in imports
    assert Import(f"{PACKAGE}.data.digits", "sklearn.datasets", eager=False) in imports
    assert len(list(edges_between_rooms(imports))) > 30


# --- the checker, checked ---------------------------------------------------------------------------------------------


def write(folder, files):
    """A synthetic package: dotted module under hesscope -> source."""
    for name, text in files.items():
        path = folder / PACKAGE / Path(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports_of(folder)


EDGES = {
    "upward": ("core.rng", "from hesscope.operators.curvature import Hessian", ["core.rng (level 0)"]),
    "upward, as a module": ("core.rng", "import hesscope.operators.curvature", ["core.rng (level 0)"]),
    "upward, from the package": ("core.rng", "from hesscope import operators", ["core.rng (level 0)"]),
    "upward, relative": ("core.rng", "from ..operators import curvature", ["core.rng (level 0)"]),
    "upward, in a function": ("core.rng", "def f():\n    import hesscope.operators.curvature", ["core.rng (level 0)"]),
    "upward, for types": (
        "core.rng",
        "if TYPE_CHECKING:\n    import hesscope.operators.curvature",
        ["core.rng (level 0)"],
    ),
    "upward, to the table of contents": ("core.rng", "import hesscope", ["core.rng (level 0)"]),
    "sideways": ("objective.losses", "from hesscope.partition import schemes", ["objective.losses (level 1)"]),
    "report to model": ("report.page", "import hesscope.operators.curvature", ["report.page (level 5)"]),
    "downward": ("operators.curvature", "from hesscope.core import rng\nfrom hesscope.objective.losses import x", []),
    "own room": ("operators.curvature", "from hesscope.operators import bridges", []),
    "version": ("core.rng", "from hesscope._version import __version__", []),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_checker_catches(name, tmp_path):
    importer, text, expected = EDGES[name]
    others = dict.fromkeys(("core.rng", "objective.losses", "partition.schemes", "operators.__init__"), "")
    others |= {"operators.curvature": "", "operators.bridges": "", "_version": "", "__init__": ""}
    found = violations(write(tmp_path, {**others, importer: text}))
    assert len(found) == len(expected)
    for message, start in zip(found, expected, strict=True):
        assert message.startswith(f"hesscope.{start} imports hesscope")


def test_the_checker_catches_a_cycle(tmp_path):
    files = {"core.a": "import hesscope.core.b", "core.b": "from hesscope.core import c", "core.c": ""}
    assert cycle_in(write(tmp_path, files), "core") is None
    cycle = cycle_in(write(tmp_path, {**files, "core.c": "from . import a"}), "core")
    assert set(cycle) == {"hesscope.core.a", "hesscope.core.b", "hesscope.core.c"}


def test_the_checker_catches_a_heavy_import(tmp_path):
    lazy = "import os, scipy.special\ndef f():\n    import xarray\nif TYPE_CHECKING:\n    import xarray\n"
    assert not_bare(write(tmp_path, {"core.a": lazy, "study.b": "import pydantic"})) == []
    found = not_bare(write(tmp_path, {"core.a": lazy + "try:\n    import xarray\nfinally:\n    pass"}))
    assert found == ["hesscope.core.a imports xarray"]


# --- the table of contents --------------------------------------------------------------------------------------------


def test_importing_hesscope_does_not_wait_for_torch():
    code = "import sys, hesscope; hesscope.__version__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_lower_levels_run_on_a_bare_image():
    """Loading everything up to level 3 loads no library beyond torch, NumPy and SciPy."""
    code = (
        "import sys, hesscope as hs; hs.block_energies, hs.Objective, hs.Hessian, hs.data, hs.models; "
        "print([m for m in ('xarray', 'sklearn', 'matplotlib', 'pydantic', 'typer', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted({*hs.__all__, *dir(hs)} - {"__getattr__", "__dir__"}))
def test_every_public_name_resolves(name):
    assert getattr(hs, name) is not None


# DESIGN.md, "Public names": tests outside the repository call these.
CONTRACT = {
    "Objective": ("num_terms", "value", "gradient"),
    "ParameterSpace": ("size", "flatten", "unflatten"),
    "Hessian": ("__matmul__", "__add__", "__sub__", "__mul__", "dense", "to_scipy"),
    "GaussNewton": ("__matmul__", "__add__", "__sub__", "__mul__", "dense", "to_scipy"),
    "Partition": ("by_tensor", "by_layer", "by_row", "by_column", "by_head", "from_blocks", "sizes"),
    "BlockEnergies": ("diagonality", "off_diagonal_ratio", "to_xarray", "from_xarray"),
    "block_energies": (),
    "EmpiricalFisher": ("__matmul__", "restrict", "dense", "to_scipy"),
    "Estimate": ("confidence_interval", "to_xarray", "from_xarray"),
    "Eigenpairs": ("to_xarray", "from_xarray"),
    "SpectralDensity": ("density", "moment", "confidence_band", "to_xarray", "from_xarray"),
    "trace": (),
    "frobenius_norm_squared": (),
    "diagonal": (),
    "top_eigenpairs": (),
    "spectral_density": (),
    "output_layer_energies": (),
    "pac_bayes_bound": (),
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract(name):
    value = getattr(hs, name)
    assert all(hasattr(value, member) for member in CONTRACT[name])


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'hesscope' has no attribute 'Hesian'"):
        _ = hs.Hesian
