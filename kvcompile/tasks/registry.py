"""Tasks by name. A new one is a module and its line in `TASKS`, or an entry point of another package."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kvcompile.options import filled
from kvcompile.plan.extensions import imported, is_a, named, with_extensions
from kvcompile.tasks.base import Task

GROUP = "kvcompile.tasks"
TASKS = {
    "needle": "kvcompile.tasks.needle:Needle",
    "perplexity": "kvcompile.tasks.perplexity:Perplexity",
    "multi_turn": "kvcompile.tasks.multi_turn.task:MultiTurn",
    "ruler": "kvcompile.tasks.ruler.task:Ruler",
    "longbench": "kvcompile.tasks.longbench.task:LongBench",
}


@functools.cache
def discover() -> dict[str, type[Task]]:
    """All tasks by name: those of `TASKS`, and entry points of the group `kvcompile.tasks`.

    Raises KvcompileError if an entry point cannot be loaded, is no task, or takes a name that is taken.
    """
    return with_extensions(GROUP, "task", imported(TASKS), "a Task", is_a(Task))


def task_class(name: str) -> type[Task]:
    """The task called `name`. Raises KvcompileError with the nearest name and the list of all."""
    return named("task", name, discover())


def build_tasks(options: Mapping[str, Mapping[str, Any] | None]) -> tuple[Task, ...]:
    """The tasks with their options over the defaults, in order.

    Raises KvcompileError for an unknown task or option, a value of the wrong type or out of range.
    """
    return tuple(filled(task_class(name), f"tasks.{name}", values or {}) for name, values in options.items())
