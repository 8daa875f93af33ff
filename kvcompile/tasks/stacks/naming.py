"""What a stack is called, and the words of the command line that make it."""

from __future__ import annotations

import re
from typing import Any

from kvcompile.analysis.compare.entry import Entry
from kvcompile.analysis.run import shown
from kvcompile.config.schema import Config
from kvcompile.errors import KvcompileError

DENSE = "dense"


def name_of(config: Config) -> str:
    """What a stack is called: its recipe, or its policies, and what differs; `dense` without any."""
    words = stack_words(config)
    return " ".join(word.removeprefix("recipe=") for word in words) if words else DENSE


def stack_words(config: Config) -> list[str]:
    """The stack as on the command line: `recipe=snapkv budget=0.1`."""
    first, usual = _reference(config)
    changed = {
        f"stack.{name}.{key}": value
        for name, options in config.stack.items()
        for key, value in options.items()
        if value != usual.stack[name][key] and not (usual.stack[name][key] is None and isinstance(value, list))
    }  # a list where there was none is what calibration found
    budgets = {f"stack.{name}.budget" for name, options in config.stack.items() if "budget" in options}
    values = {changed.get(key) for key in budgets}
    if budgets and len(values) == 1 and None not in values:
        changed = {"budget": values.pop(), **{key: v for key, v in changed.items() if key not in budgets}}
    words = [f"{key}={shown(value)}" for key, value in changed.items()]
    if config.prefill_chunk != usual.prefill_chunk:
        words.append(f"prefill_chunk={config.prefill_chunk}")
    return [first] * bool(first) + words + differing("heal", config.heal, usual.heal)


def _reference(config: Config) -> tuple[str, Config]:
    """What a stack is told apart from: how it is called, and its config: its recipe, or its policies as they are."""
    if not config.stack:
        return "", Config()
    if config.recipe and re.fullmatch(r"[\w-]+", config.recipe):
        try:
            usual = Entry(config.recipe).config()
            if list(usual.stack) == list(config.stack):
                return f"recipe={config.recipe}", usual
        except KvcompileError:  # a recipe of the user's own folder
            pass
    policies = f"policy=[{','.join(config.stack)}]"
    return policies, Entry(policies).config()


def differing(where: str, values: Any, usual: Any) -> list[str]:
    """Settings as on the command line, where they differ from the usual; of paths, the last part alone."""
    every = vars(values).items()
    return [f"{where}.{key}={shown(v)}" for key, v in every if key != "name" and v != vars(usual)[key]]
