"""torch.compile around a compiled model: the cache and generated code run as they are, torch compiles the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract_table import STORED, TABLE, Options
from tiny import tiny_ids, tiny_model
from torch import Tensor, nn

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.stack import build_stack, plan_stack

PROMPT, NEW = 40, 4  # a step of four completes a block of a block transformer, in each sequence at another
SELECTING = ("adakv", "h2o, paged, offload", "snapkv, int8", "tova, kivi, paged")
STACKS: dict[str, Options] = {
    "dense": {},
    **{name: TABLE[name].fields(24, decode_every=2) for name in SELECTING},
    "fp8": STORED["fp8"][0],
    "block_transformer, snapkv": {"block_transformer": {}, "snapkv": {"window": 4, "budget": 0.5}},
}


def compiled(stack: Options) -> Any:
    """Few layers, as torch takes seconds for each; modules and torch's linear layers run, as they do in a trace."""
    model = tiny_model(num_hidden_layers=2 if {"offload", "block_transformer"} & stack.keys() else 1)
    compile_plan(model, plan_stack(describe(model.config, "float32"), build_stack(list(stack), stack)).plan, "auto")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            vars(module).pop("forward", None)
    model.kvcompile.steps = None
    return model


def generated(model: Any) -> tuple[Tensor, Tensor]:
    """Tokens and their logits, of a padded batch."""
    ids = tiny_ids(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits)


@pytest.fixture(autouse=True)
def forget() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", STACKS)
def test_tokens_are_those_of_the_model_alone(name: str) -> None:
    """To the bit, in every storage: pointers outlived their tensors where torch cut a function that calls a kernel."""
    model = compiled(STACKS[name])
    tokens, expected = generated(model)
    model.forward = torch.compile(model.forward, backend="eager")
    got_tokens, got = generated(model)
    assert torch.equal(got_tokens, tokens)
    assert torch.equal(got, expected)


def wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("way", [wrapped, in_place])
def test_every_way_to_compile_gives_the_same(way: Callable[[Any], Any]) -> None:
    model, ids = compiled(TABLE["snapkv"].fields(24)), tiny_ids(1, PROMPT)
    with torch.no_grad():
        first = model(ids)
        second = model(ids[:, :1], past_key_values=first.past_key_values)
        faster = way(copy.copy(model))
        out = faster(ids)
        assert torch.equal(out.logits, first.logits)
        again = faster(ids[:, :1], past_key_values=out.past_key_values)
    assert torch.equal(again.logits, second.logits)
    assert again.past_key_values.lengths() == second.past_key_values.lengths()
