"""Analyses by name: ours, and those of other packages; what a module of one must not import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvcompile.analysis import registry
from kvcompile.analysis.base import Analysis
from kvcompile.errors import KvcompileError
from kvcompile.plan import extensions


@dataclass(frozen=True)
class Foreign(Analysis):
    name: ClassVar[str] = "foreign"
    summary: ClassVar[str] = "of another package"
    depth: int = 1


def discovered(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> dict[str, type[Analysis]]:
    def load() -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    entry = SimpleNamespace(name=name, value="package:Foreign", load=load)
    monkeypatch.setattr(extensions, "entry_points", lambda group: [entry] if group == "kvcompile.analyses" else [])
    return registry.discover.__wrapped__()  # without the cache


def test_analyses_of_other_packages_are_found_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = discovered(monkeypatch, "foreign", Foreign)
    assert classes["foreign"] is Foreign
    assert list(classes)[:-1] == list(registry.ANALYSES)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("other", Foreign, "must be an Analysis of that name"),
        ("foreign", object, "must be an Analysis of that name"),
        ("foreign", ImportError("no numpy"), "does not load, got no numpy"),
    ],
)
def test_what_is_no_analysis_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: Any, message: str) -> None:
    with pytest.raises(KvcompileError) as error:
        discovered(monkeypatch, name, value)
    assert message in str(error.value)


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Again(Foreign):
        name: ClassVar[str] = "lmba"

    with pytest.raises(KvcompileError, match="analysis 'lmba' is there twice"):
        discovered(monkeypatch, "lmba", Again)


def test_finding_all_analyses_imports_nothing_heavy() -> None:
    code = "import sys; from kvcompile.analysis.registry import discover; discover(); "
    code += "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
