"""The examples (`>>>`) in the docstrings of the public interface run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile

PUBLIC = (
    *(f"kvcompile.{name}" for name in kvcompile.__all__ if name != "__version__"),
    "kvcompile.compiler.compile_plan",
    "kvcompile.evaluation.perplexity.cached_log_likelihood",
    "kvcompile.evaluation.perplexity.cached_perplexity",
    "kvcompile.plan.plan.Plan",
    "kvcompile.plan.policy.Policy",
    "kvcompile.policies.base.SelectionPolicy",
    "kvcompile.runtime.cache.KVCache",
    "kvcompile.runtime.cache.KVCache.crop",
    "kvcompile.runtime.cache.KVCache.fork",
    "kvcompile.runtime.cache.KVCache.lengths",
    "kvcompile.runtime.cache.KVCache.nbytes",
    "kvcompile.runtime.cache.KVCache.reset",
    "kvcompile.runtime.model.CompiledMixin.new_cache",
)


def resolved(name: str) -> Any:
    """What a dotted name means: a module as far as there is one, then attributes."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names at hand: `model` (a tiny llama of 4 layers, 2 KV heads), `tokenizer`, `ids [1, 100]`, `folder`, `torch`."""
    monkeypatch.setenv("CXX", "none")  # examples need no compiled kernels
    at_hand = {
        "kvcompile": kvcompile,
        "torch": torch,
        "model": tiny_model(),
        "tokenizer": tiny_tokenizer(),
        "ids": tiny_ids(1, 100),
        "folder": tmp_path,
    }
    example = doctest.DocTestParser().get_doctest(resolved(name).__doc__ or "", at_hand, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append)
    assert not result.failed, "".join(said)
