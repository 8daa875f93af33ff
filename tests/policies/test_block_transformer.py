"""What a stack with a block transformer holds, what acts on which decoder, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from blocks_working import LENGTHS, Options, compiled, conversation, plan_of, rows_of
from tiny import tiny_config, tiny_ids

from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.plan.plan import Plan
from kvcompile.stack import build_stack, plan_stack

SNAPKV = {"snapkv": {"window": 4, "kernel": 3, "budget": 0.5, "sinks": 1}}
KIVI = {"kivi": {"bits": 8, "group": 4, "residual": 8}}
STACKS: dict[str, Options] = {
    "alone": {},
    "snapkv": SNAPKV,
    "snapkv, kivi": {**SNAPKV, **KIVI},
    "h2o, at each block": {"h2o": {"budget": 6, "sinks": 1, "decode_every": 1}},
    "tova, every third": {"tova": {"budget": 6, "sinks": 1, "decode_every": 3}},
    "streaming, compact": {"streaming": {"budget": 6, "sinks": 1, "decode_every": 2, "positions": "compact"}},
    "zigzag": {"zigzag": {"budget": 0.5, "window": 4}},
    "adakv, kivi, paged": {"adakv": {"budget": 0.5}, **KIVI, "paged": {"page": 4}},
    "int8": {"int8": {"residual": 3}},
    "rotate, kivi": {"rotate": {}, **KIVI},
    "offload": {"offload": {}},
    "clusterkv": {"clusterkv": {"budget": 6, "skip_layers": [], "sinks": 1, "recent": 2, "every": 2}},
    "quest": {"quest": {"budget": 6, "page": 2, "skip_layers": [], "sinks": 1, "recent": 2}},
    "infllm": {"infllm": {"budget": 6, "block": 2, "strongest": 1, "sinks": 1, "recent": 2, "every": 2}},
}
BEFORE: dict[str, Options] = {
    "gqa": {"gqa": {}},
    "cla": {"cla": {}},
    "mlkv": {"mlkv": {"layers": 2}},
}


def stack_of(others: Options, before: Options | None = None) -> Options:
    return {**(before or {}), "block_transformer": {}, **others}


def test_the_plan_says_blocks_for_the_lower_half_and_places_for_the_upper() -> None:
    plan = plan_of()
    assert [plan.kept(i, 23) for i in range(4)] == [(5, 5), (5, 5), (6, 6), (6, 6)]
    assert [plan.kept(i, 24) for i in range(4)] == [(6, 6), (6, 6), (3, 3), (3, 3)]
    rows = plan.bytes(2, 23)
    assert [row.bytes for row in rows] == [2 * 2 * n * 2 * 16 * 8 for n in (5, 5, 6, 6)]
    assert [row.dense_bytes for row in rows] == [2 * 2 * 23 * 2 * 16 * 8] * 4
    assert json.loads(json.dumps(plan.to_json()))["blocks"] == {
        "length": 4,
        "split": 2,
        "embedder": "mean",
        "prefix": 2,
    }
    assert "blocks" not in describe(tiny_config("llama")).to_json()


@pytest.mark.parametrize("others", STACKS.values(), ids=STACKS)
def test_policies_behind_it_act_on_the_block_decoder(others: Options) -> None:
    plan = plan_of(stack_of(others), dtype="float32")
    assert plan.layers[2:] == plan_of(dtype="float32").layers[2:]
    if others:
        alone = plan_stack(
            dataclasses.replace(plan_of(dtype="float32").decoder, applied=()), build_stack(list(others), others)
        ).plan
        assert plan.decoder.layers == alone.layers
    prove(compiled(stack_of(others), dtype="float32"), tiny_ids(1, 150))


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_heads_and_layers_may_be_merged_before_it(before: Options) -> None:
    prove(compiled(stack_of(SNAPKV, before), dtype="float32"), tiny_ids(1, 60))


@torch.no_grad()
@pytest.mark.parametrize("others", STACKS.values(), ids=STACKS)
def test_a_batch_is_so_many_batches_of_one(others: Options) -> None:
    """Sequences complete their blocks at different steps, and turns end in the middle of one."""
    for chunk in (0, 16) if "snapkv" in others else (0,):
        model = compiled(stack_of(others), chunk=chunk)
        first, second = rows_of((*LENGTHS[:3], 61)), rows_of((7, 4, 2, 26), seed=50)
        decoded = tiny_ids(4, 50, seed=99)
        turns = [decoded[:, :37], decoded[:, 37:]]
        together, _ = conversation(model, [first, second], turns)
        for b in range(4):
            alone, _ = conversation(model, [first[b : b + 1], second[b : b + 1]], [x[b : b + 1] for x in turns])
            torch.testing.assert_close(together[b], alone[0], rtol=0, atol=1e-4)


def refusal(stack: Options, architecture: str = "llama", **over: Any) -> str:
    identity: Plan = describe(tiny_config(architecture, **over))
    with pytest.raises(KvcompileError) as error:
        plan_stack(identity, build_stack(list(stack), stack))
    return str(error.value)


def test_what_makes_no_sense_is_refused_in_a_sentence() -> None:
    assert "'mla' in the stack" in refusal({"mla": {}, "block_transformer": {}})
    assert "layer 2 holds the tokens of one block, layer 0 holds blocks" in refusal(
        {"cla": {"pattern": [0, 0, 0, 3]}, "block_transformer": {}}
    )
    assert "both decoders need at least one layer" in refusal({"block_transformer": {"split": 4}})
    assert "a window of 16 tokens" in refusal({"block_transformer": {}}, "mistral")
    assert "built like llama" in refusal({"block_transformer": {}}, "gemma2")
    assert "tiers are divided in all of them at once" in refusal({"block_transformer": {}, "leankv": {}})
    assert "tiers are divided in all of them at once" in refusal({"block_transformer": {}, "tiers": {}})
    assert "stack.clusterkv.reuse=1" in refusal({"block_transformer": {}, "clusterkv": {"reuse": 2, "skip_layers": []}})
    assert "grouped anew" in refusal({"block_transformer": {}, "snapkv": {}, "clusterkv": {"skip_layers": []}})
    assert "which heads retrieve to be found" in refusal({"block_transformer": {}, "retrieval_heads": {}})
    assert "skip_layers must be in 0..1" in refusal({"block_transformer": {}, "int8": {"skip_layers": [3]}})


def test_a_policy_on_the_token_decoder_is_refused_by_the_plan() -> None:
    plan = plan_of()
    upper = dataclasses.replace(plan.layers[3], storage=plan_of({"int8": {}}).layers[3].storage)
    with pytest.raises(KvcompileError, match="layer 3 is part of the token decoder"):
        dataclasses.replace(plan, layers=(*plan.layers[:3], upper)).check()
