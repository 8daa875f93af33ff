"""KVzip: its prompts, its score, and what it cannot be combined with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import KVZIP, compiled, dense, plan_of
from observation import naive_attention, observation, same
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import require_turnable
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.exporters.registry import build_exporters, require_open
from kvcompile.models.sharing import shared
from kvcompile.policies.kvzip import KVzip, RepeatedAttention
from kvcompile.stack import build_stack


def test_the_score_is_the_most_that_a_query_pays() -> None:
    for shape in ({}, {"lengths": [37, 19]}, {"softcap": 0.7}, {"sliding_window": 11}):
        seen = observation(**shape)
        same(RepeatedAttention(False).observe(seen), naive_attention(seen).amax((1, 2)), seen)


def test_normalised_attention_is_a_share_of_the_state() -> None:
    """Also where queries are seen in blocks."""
    seen = observation(entries=400, window=300)
    values, states = torch.rand(2, 3, 400) + 0.5, torch.rand(2, 3, 300) + 0.5
    seen = replace(seen, value_norms=values, hidden_norms=states)
    expected = (seen.attention() * values.unsqueeze(2) / states.unsqueeze(-1)).amax((1, 2))
    same(RepeatedAttention(True).observe(seen), expected, seen)


def test_prompts_are_made_by_the_tokenizer_and_saved(tmp_path: Path) -> None:
    """They go into the artifact: a model that is loaded has no need of its tokenizer."""
    over = ["policy=[kvzip]", "stack.kvzip.prompt=w5 w6", "stack.kvzip.later=w7", "budget=20"]
    model = kvcompile.compile(tiny_model(), overrides=over, tokenizer=tiny_tokenizer())
    replay = model.kvcompile.plan.replayed.replay
    assert (replay.first, replay.later) == ((5, 6), (7,))
    loaded = kvcompile.load(kvcompile.save(model, tmp_path / "kvzip"))
    assert loaded.kvcompile.plan == model.kvcompile.plan
    ids = tiny_ids(1, 60)
    with torch.no_grad():
        assert torch.equal(loaded(ids).past_key_values.layers[0].keys, model(ids).past_key_values.layers[0].keys)


def test_a_chat_template_closes_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w9 {{ messages[0]['content'] }} w10{% if add_generation_prompt %} w11{% endif %}"

    class Calibrator:
        def __init__(self, tokenizer: Any) -> None:
            self.tokenizer = tokenizer

    made = KVzip(chat=True).calibrated(Calibrator(tokenizer))
    assert made.ids[2] == [10, 11]
    assert made.calibrated(Calibrator(None)) == made
    with pytest.raises(KvcompileError, match="chat template"):
        KVzip(chat=True).require_calibratable(tiny_tokenizer())


def test_what_no_replay_can_do_is_refused_in_a_sentence() -> None:
    def refused(match: str, call: Any) -> None:
        with pytest.raises(KvcompileError, match=match) as error:
            call()
        assert "\n" not in str(error.value)

    kvzip = {"kvzip": KVZIP}
    refused("needs a tokenizer", lambda: kvcompile.compile(tiny_model(), overrides=["policy=[kvzip]"]))
    refused("no tokenizer has made them", lambda: compile_plan(shared(dense()), plan_of({"kvzip": {}})))
    refused("brings the prompts", lambda: plan_of({"adakv": {"score": "kvzip"}}))
    refused("brings the prompts", lambda: plan_of({"retrieval_heads": {"score": "kvzip", "keep": 0.5}}))
    refused("recall chooses", lambda: plan_of({**kvzip, "quest": {}}))
    refused("layer 0 holds blocks", lambda: plan_of({"block_transformer": {}, **kvzip}))
    refused("all select at the same time", lambda: plan_of({**kvzip, "adakv": {"skip_layers": [1], "decode_every": 5}}))
    beyond = {"kvzip": {**KVZIP, "ids": [[128], [], []]}}
    refused("tokens of the model, 0 to 127", lambda: compile_plan(shared(dense()), plan_of(beyond)))
    for ids in ([[1], [2]], [[1], [2], [-3]]):
        refused("three lists", lambda ids=ids: build_stack(["kvzip"], {"kvzip": {"ids": ids}}))
    embedded = torch.zeros(1, 30, 64)
    refused("repeats token ids", lambda: compiled(kvzip, kernels="sdpa")(inputs_embeds=embedded))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_angles_that_follow_the_longest_position_are_refused(kind: str) -> None:
    plan = plan_of({"kvzip": KVZIP})
    config = tiny_model().config
    config.rope_parameters = {**config.rope_parameters, "rope_type": kind}
    with pytest.raises(KvcompileError, match="a replay stands behind the text"):
        require_turnable(plan, config)


@pytest.mark.parametrize("export", ["torch", "aoti", "onnx", "hf", "gguf", "deepseek"])
def test_no_export_replays(export: str) -> None:
    with pytest.raises(KvcompileError):
        require_open(build_exporters({export: None}), plan_of({"kvzip": KVZIP}), dense().config)
