"""Compiled block transformers for tests, and padded batches for them."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.plan.plan import Plan
from kvcompile.stack import build_stack, plan_stack
from kvcompile.structure.blocks import add_blocks

Options = dict[str, dict[str, Any]]
DEFAULT: Options = {"block_transformer": {}}
LENGTHS = (1, 3, 8, 14, 30)  # prompts without a complete block, with whole ones, with a rest of 2


def plan_of(stack: Options = DEFAULT, architecture: str = "llama", dtype: str = "float64", chunk: int = 0) -> Plan:
    identity = replace(describe(tiny(architecture, dtype).config, dtype), prefill_chunk=chunk)
    return plan_stack(identity, build_stack(list(stack), stack)).plan


def tiny(architecture: str = "llama", dtype: str = "float64") -> Any:
    over = {"sliding_window": None} if architecture in ("mistral", "phi3") else {}
    return tiny_model(architecture, **over).to(getattr(torch, dtype))


@functools.cache
def _compiled(stack: str, architecture: str, dtype: str, kernels: str, chunk: int) -> Any:
    plan = plan_of(json.loads(stack), architecture, dtype, chunk)
    return compile_plan(tiny(architecture, dtype), plan, kernels)


def compiled(
    stack: Options = DEFAULT,
    architecture: str = "llama",
    dtype: str = "float64",
    kernels: str = "sdpa",
    chunk: int = 0,
) -> Any:
    """A tiny model compiled with a stack, built once."""
    return _compiled(json.dumps(stack), architecture, dtype, kernels, chunk)


@functools.cache
def divided(architecture: str, plan: Plan) -> Any:
    """The same model as transformers has it, with the new modules: what the oracle reads."""
    if plan.blocks is None:
        raise ValueError("no blocks")
    model = tiny(architecture)
    add_blocks(model, plan.blocks)
    return model


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch `[B, n]` with padding on the left, and its mask."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


def rows_of(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """A row of ids of each length."""
    return [tiny_ids(1, n, seed=seed + n)[0] for n in lengths]


@torch.no_grad()
def conversation(model: Any, turns: Sequence[Sequence[Tensor]], decoded: Sequence[Tensor]) -> tuple[Tensor, Any]:
    """Logits `[B, steps, vocabulary]` after each turn and each token decoded behind it `[B, n]`, and the cache."""
    cache, logits = model.new_cache(), []
    mask = torch.zeros(len(turns[0]), 0, dtype=torch.int64, device="cpu")
    for turn, following in zip(turns, decoded, strict=True):
        ids, real = padded(turn)
        mask = torch.cat((mask, real), 1)
        logits.append(model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits)
        for token in torch.split(following, 1, 1):
            mask = torch.cat((mask, torch.ones_like(token)), 1)
            logits.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1), cache
