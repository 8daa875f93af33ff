"""The contract of structural policies, for each row of the table: bytes, batches, artifacts, and what they go with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import DIVIDED, STRUCTURES, compiled, dense
from tiny import ARCHITECTURES, tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import kvcompile
from kvcompile import compiler
from kvcompile.artifact import artifact, manifest
from kvcompile.compiler import assemble
from kvcompile.config.compose import compose
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.graph.wiring import wiring
from kvcompile.models.sharing import shared
from kvcompile.report import plan_table
from kvcompile.stack import discover

EVERY = {**STRUCTURES, **DIVIDED}
every = pytest.mark.parametrize("name", STRUCTURES)
divided_too = pytest.mark.parametrize("name", EVERY)
OWNERS = {"gemma2": [0, 1, 0, 1], "gemma3_text": [0, 1, 0, 1], "gpt_oss": [0, 1, 0, 1], "smollm3": [0, 0, 0, 3]}
SELECTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 20, "window": 8, "kernel": 3, "decode_every": 3},
    "zigzag": {"budget": 40, "window": 8},
    "h2o": {"budget": 24},
    "expected_attention": {"budget": 24},
    "streaming": {"budget": 24, "positions": "compact"},
}


def assembled(stack: dict[str, dict[str, Any]], architecture: str = "llama", **more: Any) -> Any:
    config = Config(stack=stack, kernels="sdpa", **more)  # generated kernels: `compiled`
    return assemble(shared(dense(architecture)), finish(config), tiny_tokenizer())


@torch.no_grad()
def generated(model: Any, ids: Any, mask: Any = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


def test_every_structural_policy_has_a_row() -> None:
    assert {p for stack in EVERY.values() for p in stack} == {
        name for name, cls in discover().items() if cls.family == "structure"
    }


@every
def test_measured_bytes_are_the_planned_ones(name: str) -> None:
    for architecture in ("llama", "mistral", "gpt_neox"):
        stack = STRUCTURES[name]
        if architecture == "gpt_neox" and "groups" in json.dumps(stack):
            continue  # given for two heads
        rows, _ = prove(compiled(stack, architecture), tiny_ids(1, 60))  # raises where they differ
        assert 2 * sum(r.bytes for r in rows) <= sum(r.dense_bytes for r in rows)
        assert [r.dense_bytes for r in rows] == [r.bytes for r in prove(compiled({}, architecture), tiny_ids(1, 60))[0]]


@pytest.mark.parametrize("name", DIVIDED)
def test_measured_bytes_of_blocks_are_the_planned_ones(name: str) -> None:
    for tokens in (60, 63):
        rows, _ = prove(compiled(DIVIDED[name]), tiny_ids(1, tokens))
        assert 2 * sum(r.bytes for r in rows) <= sum(r.dense_bytes for r in rows)
        dense_rows, _ = prove(compiled({}), tiny_ids(1, tokens))
        assert [r.dense_bytes for r in rows] == [r.bytes for r in dense_rows]


@pytest.mark.parametrize("selection", SELECTIONS)
@every
def test_a_selection_on_top_keeps_its_promises(name: str, selection: str) -> None:
    model = assembled({**STRUCTURES[name], selection: SELECTIONS[selection]}, prefill_chunk=32)
    rows, _ = prove(model, tiny_ids(1, 60))
    owners = [r for r in rows if r.kept and sum(r.kept)]
    assert sum(sum(r.kept) for r in owners) == int(SELECTIONS[selection]["budget"]) * sum(r.kv_heads for r in owners)
    ids = tiny_ids(1, 60)
    assert generated(model, ids).shape == (1, 68)


@divided_too
def test_a_padded_batch_is_its_sequences_one_by_one(name: str) -> None:
    model, ids, mask = compiled(EVERY[name]), tiny_ids(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :7], mask[2, :1] = 0, 0
    together = generated(model, ids, mask)
    for b in range(3):
        real = mask[b].bool()
        assert torch.equal(generated(model, ids[b : b + 1, real])[0, real.sum() :], together[b, 30:])


@divided_too
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    model = assembled({**EVERY[name], "snapkv": SELECTIONS["snapkv"]})
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    ids = tiny_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generated(loaded, ids), generated(model, ids))
    assert loaded.kvcompile.plan == model.kvcompile.plan
    assert loaded.config.num_key_value_heads == model.config.num_key_value_heads
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert wiring(loaded.kvcompile.graph.graph) == {p.index: p.owner for p in model.kvcompile.plan.layers}
    again = artifact.save(loaded, tmp_path / "again")
    assert kvcompile.load(again).kvcompile.plan == model.kvcompile.plan


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_comes_back(architecture: str, tmp_path: Path) -> None:
    stack = {"gqa": {}, "cla": {"pattern": OWNERS.get(architecture, [0, 0, 2, 2]), "fold": "mean"}}
    model = assembled(stack, architecture)
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    ids = tiny_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generated(loaded, ids), generated(model, ids))
    assert type(loaded).__name__ == type(model).__name__
    assert type(loaded).__mro__[2] is type(dense(architecture)), "no trace of how it was loaded"


def test_alignment_is_not_repeated_when_loading(tmp_path: Path) -> None:
    """It needs text, which an artifact has not: the weights are in it as they are."""
    model = assembled({"gqa": {"kv_heads": 1, "align": "both", "tokens": 64}})
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    with torch.no_grad():
        assert torch.equal(loaded(tiny_ids(1, 20)).logits, model(tiny_ids(1, 20)).logits)
    plain = assembled({"gqa": {"kv_heads": 1}})
    key = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(plain.state_dict()[key], model.state_dict()[key])


def test_an_export_of_a_converted_model_compiles_again(tmp_path: Path) -> None:
    model = assembled({"gqa": {}})
    kvcompile.export(model, "hf", tmp_path / "export")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert stock.config.num_key_value_heads == 1
    with torch.no_grad():
        torch.testing.assert_close(stock(tiny_ids(2, 30)).logits, model(tiny_ids(2, 30)).logits, atol=1e-5, rtol=1e-5)
    again = kvcompile.compile(stock, overrides=["policy=[snapkv]", "stack.snapkv.budget=0.5"])
    assert [p.dense_heads for p in again.kvcompile.plan.layers] == [1] * 4, "it has no other heads now"


def test_a_truncated_conversion_is_refused(tmp_path: Path) -> None:
    """An artifact whose weights are not those of its recipe's conversion does not load."""
    from safetensors.torch import load_file, save_file

    path = artifact.save(assembled({"cla": {}}), tmp_path / "artifact")
    weights = load_file(path / "model.kvcompile.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, path / "model.kvcompile.safetensors", metadata={"format": "pt"})
    manifest.write(path, manifest.read(path).plan)
    with pytest.raises(KvcompileError, match=r"weights of its config: it asks for [0-9,]+ numbers, got [0-9,]+"):
        kvcompile.load(path)


@pytest.mark.parametrize("heads", ["'4'", 3, 0, [2]])
def test_an_original_that_cannot_be_is_refused(heads: Any, tmp_path: Path) -> None:
    path = artifact.save(assembled({"gqa": {}}), tmp_path / "artifact")
    config = json.loads((path / "config.json").read_text())
    assert config["kvcompile"]["original"]["num_key_value_heads"] == 2
    config["kvcompile"]["original"]["num_key_value_heads"] = heads
    (path / "config.json").write_text(json.dumps(config))
    manifest.write(path, manifest.read(path).plan)
    with pytest.raises(KvcompileError, match="num_key_value_heads must divide the query heads"):
        kvcompile.load(path)


def test_retrieval_heads_are_looked_for_in_the_converted_model() -> None:
    """Heads are numbered as the plan counts them, and only owners have any."""
    options = {"samples": 1, "tokens": 128, "fraction": 0.5, "budget": 24, "recent": 4}
    model = assembled({"gqa": {}, "cla": {"pattern": [0, 1, 1, 0]}, "retrieval_heads": options})
    found = [
        p.index for p in model.kvcompile.plan.layers if p.selection and p.selection.allocation.traits.scope == "head"
    ]
    assert len(found) == 1
    assert found[0] in (0, 1)
    prove(model, tiny_ids(1, 60))


def test_four_kinds_multiply(tmp_path: Path) -> None:
    """Fewer heads x fewer layers x fewer tokens x fewer bits: bytes as planned, and the same after loading."""
    quantized = {"bits": 8, "group": 4, "residual": 8}
    stack = {"gqa": {}, "cla": {}, "snapkv": {**SELECTIONS["snapkv"], "budget": 40}, "kivi": quantized}
    model = assembled(stack)
    rows, _ = prove(model, tiny_ids(1, 60))
    held = [r.planned_bytes for r in rows]
    assert held == [r.bytes for r in rows]
    assert held[1] == held[3] == 0
    assert held[0] == held[2] < 40 * 2 * 16 * 4, "40 of 60 tokens, one head, fewer than 32 bits"
    assert sum(r.dense_bytes for r in rows) == 4 * 2 * 60 * 2 * 16 * 4
    loaded, ids = kvcompile.load(artifact.save(model, tmp_path / "artifact")), tiny_ids(2, 60)
    assert torch.equal(generated(loaded, ids), generated(model, ids))


def test_plan_only_shows_what_is_shared() -> None:
    config = compose(["policy=[gqa,cla,zigzag]", "stack.zigzag.budget=0.5", "plan=only"])
    plan = compiler.plan_config(config).plan
    held, uncompressed = plan_table.cache_bytes(plan, 1, 4096)
    assert held / uncompressed == pytest.approx(1 / 3 / 2 / 2)
    assert [p.owner for p in plan.layers][:4] == [0, 0, 2, 2]
    assert "reads layer 0" in str(plan_table._cells(plan.layers[1], plan.bytes(1, 64)[1], plan.dtype))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = kvcompile.compile(tiny_model(tie_word_embeddings=True), overrides=["policy=[mlkv]"])
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_beams_follow_the_owners_cache() -> None:
    model, ids = compiled({"gqa": {}, "cla": {}}), tiny_ids(2, 20)
    beams = generated(model, ids, num_beams=3, use_cache=True)
    assert torch.equal(beams, generated(model, ids, num_beams=3, use_cache=False))
