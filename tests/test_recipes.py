"""Every shipped recipe composes, plans, compiles, generates, and says how it is run."""

from __future__ import annotations

import functools
import io
import shlex
from importlib.resources import files
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile import compiler
from kvcompile.config.compose import compose
from kvcompile.config.recipe import from_recipe
from kvcompile.config.schema import Config
from kvcompile.policies.quantized import StoragePolicy
from kvcompile.report import plan_table
from kvcompile.stack import discover, policy_class

SHIPPED = {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files("kvcompile.recipes.recipe").iterdir()}
TOKENS, NEW = 400, 4  # longer than what any recipe keeps of it
CALIBRATED = {"retrieval_heads": "heads", "head_budgets": "shares"}
QUICK = {name: [f"stack.{name}.samples=1", f"stack.{name}.tokens=256"] for name in CALIBRATED}

every = pytest.mark.parametrize("name", sorted(SHIPPED))


@functools.cache
def shipped(name: str) -> Config:
    """What a recipe says."""
    return compose([f"recipe={name}"])


def recalls(name: str) -> bool:
    """Whether a recipe reads less than it holds."""
    return any(p.recall is not None for p in compiler.plan_config(shipped(name)).plan.layers)


def quick(name: str) -> list[str]:
    """Overrides that make a recipe's calibration and healing short."""
    config = shipped(name)
    healing = ["heal.tokens=64", "heal.length=64", "heal.batch=1"] if config.heal.tokens else []
    return healing + [o for policy in config.stack for o in QUICK.get(policy, [])]


def test_every_policy_that_selects_or_converts_has_a_recipe() -> None:
    shown = {policy for name in SHIPPED for policy in shipped(name).stack}
    assert shown >= {name for name, cls in discover().items() if cls.family in ("selection", "structure")}
    assert shown >= {name for name, cls in discover().items() if issubclass(cls, StoragePolicy)}


@every
def test_header_says_what_it_is_and_how_it_is_run(name: str) -> None:
    package, summary, command, *_ = SHIPPED[name].splitlines()
    assert package == "# @package _global_"
    assert summary.startswith("# ")
    assert summary.endswith(".")
    families = {policy_class(policy).family for policy in shipped(name).stack}
    assert ("needs healing" in SHIPPED[name]) == ("structure" in families)
    program, *overrides = shlex.split(command.removeprefix("# "))
    assert program == "kvcompile"
    assert f"recipe={name}" in overrides
    assert compose(overrides) == shipped(name)


@every
def test_plan_only(name: str) -> None:
    config = compose([f"recipe={name}", "plan=only", "plan.context=2048", "plan.memory=1"])
    plan, out = compiler.plan_config(config).plan, io.StringIO()
    plan_table.show(plan, config, Console(file=out, width=140))
    assert f"{name}-llama: llama" in out.getvalue()
    held, uncompressed = plan_table.cache_bytes(plan, 1, 2048)
    read = sum(row.read for row in plan.bytes(1, 2048))
    assert min(held, read) < uncompressed or name in ("corm", "infllm")  # a threshold, a window: promise nothing here
    far = plan.bytes(1, 16384)
    assert not recalls(name) or sum(row.read for row in far) < sum(row.dense_read for row in far) / 2


@every
def test_compiles_a_tiny_model_and_generates_in_less_memory(name: str) -> None:
    model = kvcompile.compile(tiny_model(), recipe=name, overrides=quick(name), tokenizer=tiny_tokenizer())
    ids = tiny_ids(2, TOKENS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
    assert out.sequences.shape == (2, TOKENS + NEW)
    rows = model.kvcompile.plan.bytes(2, TOKENS + NEW - 1)
    assert (out.past_key_values.evictions.events > 0) == bool(model.kvcompile.plan.selected)
    uncompressed = sum(r.dense_bytes for r in rows)
    if recalls(name):
        assert out.past_key_values.nbytes() <= uncompressed
    elif name != "corm":  # random weights: every token is important to some of its 256 queries
        assert out.past_key_values.nbytes() < uncompressed
    config = from_recipe(model.kvcompile.recipe)
    assert config.recipe == name
    for policy in config.stack.keys() & CALIBRATED.keys():
        assert config.stack[policy][CALIBRATED[policy]], "the calibration must be in the recipe that is saved"
