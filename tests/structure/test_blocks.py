"""A checkpoint divided into blocks: its new modules begin as in the paper; the oracle reads any prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from blocks_reference import block_vector, logits_of, next_logits, run
from tiny import tiny_config, tiny_ids, tiny_model

from kvcompile.adapters.architectures import architecture_of, describe
from kvcompile.errors import KvcompileError
from kvcompile.plan.blocks import Blocks
from kvcompile.structure.blocks import NAMES, add_blocks
from kvcompile.structure.convert import convert, reshape

BLOCKS = Blocks(length=4, split=2)


def divided(blocks: Blocks = BLOCKS, **over: Any) -> Any:
    model = tiny_model(**over).double()
    add_blocks(model, blocks)
    return model


@torch.no_grad()
def test_the_embedder_begins_as_the_mean_and_the_expansion_as_copies() -> None:
    model, ids = divided(Blocks(4, 2, prefix=3)), tiny_ids(1, 4)[0]
    torch.testing.assert_close(block_vector(model, BLOCKS, ids), model.model.embed_tokens(ids).mean(0))
    x = torch.randn(64, dtype=torch.float64, device="cpu")
    assert torch.equal(model.model.block_expansion(x), x.repeat(3))


@torch.no_grad()
def test_the_start_is_what_a_block_of_bos_gives() -> None:
    model = divided()
    bos = torch.full((4,), model.config.bos_token_id, dtype=torch.int64, device="cpu")
    torch.testing.assert_close(model.model.block_bos, model.model.embed_tokens(bos[0]))
    torch.testing.assert_close(model.model.block_start, run(model, range(2), block_vector(model, BLOCKS, bos)[None])[0])


def test_without_bos_eos_stands_for_it_and_without_either_there_are_zeros() -> None:
    model = divided(bos_token_id=None, eos_token_id=[2, 5])
    assert torch.equal(model.model.block_bos, model.model.embed_tokens.weight[2])
    model = divided(bos_token_id=None, eos_token_id=None)
    assert not model.model.block_start.any()
    assert not model.model.block_bos.any()


def test_no_weight_of_the_model_changes() -> None:
    before, after = tiny_model().double().state_dict(), divided().state_dict()
    assert {name.removeprefix("model.").removesuffix(".weight") for name in after.keys() - before.keys()} == {*NAMES}
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_divided_model_can_be_compiled() -> None:
    """Nothing stays on it that would: transformers hooks the layers whose outputs are asked for."""
    architecture_of(tiny_config("llama")).require_as_configured(divided())


def test_meta_models_get_modules_of_the_same_shapes() -> None:
    for blocks in (BLOCKS, Blocks(2, 1, "lookup", 1)):
        model = tiny_model().to("meta")
        add_blocks(model, blocks)
        weights = {name: w.shape for name, w in divided(blocks).state_dict().items()}
        assert {name: w.shape for name, w in model.state_dict().items()} == weights
        assert all(w.is_meta for w in model.state_dict().values())


def test_refusals() -> None:
    with pytest.raises(KvcompileError, match="divided into blocks once"):
        add_blocks(divided(), BLOCKS)
    with pytest.raises(KvcompileError, match="blocks of 5 tokens, 64 channels"):
        divided(Blocks(5, 2, "lookup"))


@pytest.mark.parametrize("blocks", [BLOCKS, Blocks(3, 1, "mean", 1), Blocks(4, 3, "lookup")])
@torch.no_grad()
def test_the_oracle_reads_prompts_of_any_length_and_never_ahead(blocks: Blocks) -> None:
    model, ids = divided(blocks), tiny_ids(1, 13)[0]
    logits = logits_of(model, blocks, ids)
    assert logits.shape == (13, 128)
    assert next_logits(model, blocks, ids[:0]).isfinite().all()
    for at in range(13):
        changed = ids.clone()
        changed[at] = 3
        other = logits_of(model, blocks, changed)
        assert torch.equal(other[:at], logits[:at])
        assert not torch.isclose(other[at:], logits[at:]).all(1).any(), "all later tokens must see this one"


@torch.no_grad()
def test_a_plan_with_blocks_converts_without_touching_projections() -> None:
    model = tiny_model()
    plan = replace(describe(model.config), blocks=BLOCKS)
    convert(model, plan)
    before = tiny_model().state_dict()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in before.items())
    assert torch.equal(model.model.block_expansion(model.model.block_start), model.model.block_start.repeat(2))
    hollow = tiny_model().to("meta")
    reshape(hollow, plan)
    assert {n: w.shape for n, w in hollow.state_dict().items()} == {n: w.shape for n, w in model.state_dict().items()}


def test_blocks_are_part_of_a_plan_and_of_its_digest() -> None:
    plan = describe(tiny_config("llama"))
    divided = replace(plan, blocks=BLOCKS)
    assert "blocks" not in plan.to_json()
    assert divided.to_json()["blocks"] == {"length": 4, "split": 2, "embedder": "mean", "prefix": 2}
    assert divided.digest() != plan.digest() != replace(plan, blocks=Blocks(8, 2)).digest() != divided.digest()
