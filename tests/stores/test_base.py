"""Stores are told apart by nobody: each answers the same questions itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for home in ("kvcompile", "kernels", "policies", "benchmarks") for path in (ROOT / home).rglob("*.py")]
STORES = {
    node.name
    for path in (ROOT / "kvcompile" / "stores").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.ClassDef) and node.name.endswith(("Store", "Codes"))
}


def named(*nodes: ast.AST) -> set[str]:
    """Names of stores in some expressions."""
    words = {getattr(x, "id", getattr(x, "attr", None)) for node in nodes for x in ast.walk(node)}
    return STORES & words


def told_apart(source: str) -> Iterator[int]:
    """Lines that ask which store something is: `isinstance`, `type(x) is`, `match`."""
    for node in ast.walk(ast.parse(source)):
        calls = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass")
        asks = calls and named(*node.args[1:])
        compares = isinstance(node, ast.Compare) and named(*node.comparators)
        matches = isinstance(node, ast.MatchClass) and named(node.cls)
        if asks or compares or matches:
            yield getattr(node, "lineno", 0)


def test_no_store_is_asked_which_one_it_is() -> None:
    """But in the factory, which decides what a layer opens."""
    assert {"DenseStore", "RaggedStore", "PagedStore", "QuantizedStore", "RaggedCodes", "PagedCodes"} <= STORES
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        if path.name != "factory.py"
        for line in told_apart(path.read_text("utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(x, RaggedStore)",
        "isinstance(x, (int, stores.DenseStore))",
        "isinstance(x, PagedStore | PagedCodes)",
        "type(x) is QuantizedStore",
        "match x:\n    case RaggedCodes():\n        pass",
    ],
)
def test_the_search_finds_what_it_looks_for(line: str) -> None:
    assert list(told_apart(line))
