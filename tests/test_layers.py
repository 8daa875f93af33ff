"""The house: imports point down the list of layers, no module is in a circle, and no file, function or folder sprawls.

Every import counts, also one inside a function; only those for the type checker (`if TYPE_CHECKING`) do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {"policies": "kvcompile.policies", "kernels": "kvcompile.kernels"}  # where top-level folders are installed

# From the ground up: a module imports what stands before its own layer, and what stands in it.
LAYERS = (
    ("errors", "output", "progress", "paths", "atomic"),
    ("options",),
    ("plan",),
    ("stack",),
    ("kernels",),
    ("stores",),
    ("recall",),
    ("models",),
    ("runtime",),
    ("graph",),
    ("adapters",),
    ("build",),
    ("calibration",),
    ("structure",),
    ("policies",),
    ("evaluation",),
    ("heal",),
    ("report",),
    ("config",),
    ("artifact",),
    ("serving",),
    ("exporters",),
    ("compiler",),
    ("analysis",),
    ("tasks",),
    ("board",),
    ("lm_eval",),
    ("searching",),
    ("doctor",),
    ("job",),
    ("cli",),
    ("__init__", "__main__"),
)
EXCEPTIONS = {  # (module, what it imports from above): why
    ("stack", "policies"): "policies are found by scanning their package",
    ("config.compose", "exporters.registry"): "names and options of exporters are part of the schema; none is imported",
    ("config.schema", "exporters.registry"): "the same",
    ("config.compose", "analysis.registry"): "names and options of analyses are part of the schema too",
    ("config.schema", "analysis.registry"): "the same",
    ("config.compose", "tasks.registry"): "names and options of tasks are part of the schema too",
    ("config.schema", "tasks.registry"): "the same",
    ("runtime.model", "artifact.artifact"): "to transformers, `save_pretrained` is a method of the model",
}
LONGEST_FILE, LONGEST_FUNCTION, FULLEST_FOLDER = 400, 50, 12


def name_of(path: Path) -> str:
    """The dotted name of a module without `kvcompile.` in front."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__" and parts != ["kvcompile", "__init__"]:
        parts.pop()
    return ".".join([HOMES.get(parts[0], parts[0]), *parts[1:]]).removeprefix("kvcompile.")


FILES = {name_of(path): path for home in ("kvcompile", *HOMES) for path in sorted((ROOT / home).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of the project that a module imports, anywhere but for the type checker."""
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield from known(f"{node.module}.{alias.name}", node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from known(alias.name)


def known(*names: str) -> Iterator[str]:
    """The first of these dotted names that is a module of the project."""
    for name in names:
        if name.startswith("kvcompile.") and name.removeprefix("kvcompile.") in FILES:
            yield name.removeprefix("kvcompile.")
            return


ARROWS = {name: sorted(set(imports(tree)) - {name}) for name, tree in TREES.items()}


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[0] for name in FILES} == set(LAYER)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downwards(name: str) -> None:
    here = LAYER[name.split(".")[0]]
    upwards = [to for to in ARROWS[name] if LAYER[to.split(".")[0]] > here and (name, to) not in EXCEPTIONS]
    assert not upwards, f"{name} imports from above: {upwards}"


def test_exceptions_are_few_and_needed() -> None:
    assert len(EXCEPTIONS) <= 8
    assert all(to in ARROWS[name] for name, to in EXCEPTIONS)


def test_no_module_is_in_a_circle() -> None:
    left = {name: set(to) - {b for a, b in EXCEPTIONS if a == name} for name, to in ARROWS.items()}
    while free := [name for name, to in left.items() if not to & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"in or above a circle: {sorted(left)}"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_readable(name: str) -> None:
    assert len(FILES[name].read_text("utf-8").splitlines()) <= LONGEST_FILE
    functions = (node for node in ast.walk(TREES[name]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION}
    assert not long, f"functions over {LONGEST_FUNCTION} lines: {long}"


def test_folders_stay_small() -> None:
    """But for `policies/`: one file a policy."""
    folders: dict[Path, int] = {}
    for path in FILES.values():
        if path.name != "__init__.py" and path.parent.name != "policies":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    full = {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > FULLEST_FOLDER}
    assert not full
