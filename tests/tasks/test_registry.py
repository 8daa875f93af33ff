"""Tasks by name: ours, and those of other packages; what a module of one must not import."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.plan import extensions
from kvcompile.tasks import registry
from kvcompile.tasks.base import Task


@dataclass(frozen=True)
class Foreign(Task):
    name: ClassVar[str] = "foreign"
    summary: ClassVar[str] = "of another package"
    depth: int = 1


def discovered(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> dict[str, type[Task]]:
    entry = SimpleNamespace(name=name, value="package:Foreign", load=lambda: value)
    monkeypatch.setattr(extensions, "entry_points", lambda group: [entry] if group == "kvcompile.tasks" else [])
    return registry.discover.__wrapped__()  # without the cache


def test_tasks_of_other_packages_are_found_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = discovered(monkeypatch, "foreign", Foreign)
    assert classes["foreign"] is Foreign
    assert list(classes)[:-1] == list(registry.TASKS)


@pytest.mark.parametrize(("name", "value"), [("other", Foreign), ("foreign", object)])
def test_what_is_no_task_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: Any) -> None:
    with pytest.raises(KvcompileError, match="must be a Task of that name"):
        discovered(monkeypatch, name, value)


def test_every_task_is_listed_with_options_and_a_summary() -> None:
    for name, cls in registry.discover().items():
        assert (cls.name, bool(cls.summary), bool(cls.metric)) == (name, True, True)
        assert registry.build_tasks({name: None}) == registry.build_tasks({name: {}})


def test_finding_all_tasks_imports_nothing_heavy() -> None:
    code = "import sys; from kvcompile.tasks.registry import discover; discover(); "
    code += "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
