"""A prompt that is read in chunks is remembered as the compiled model remembers one that is read at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import BASE, tiny_config, tiny_ids, tiny_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.exporters.vllm import VLLM
from kvcompile.serving.vllm.choice import Prompt, carry, remember, stay, waiting
from kvcompile.serving.vllm.reading import Chunk, Readings
from kvcompile.serving.vllm.rules import PromptRule, rules
from kvcompile.serving.vllm.turning import rotations, turned_back
from kvcompile.stack import apply_stack, build_stack

STACKS = {
    "expected_attention": [],
    "expected_attention in strides": ["stack.expected_attention.stride=3"],
    "ghost": ["stack.ghost.chunk=16", "stack.ghost.shift=64"],
    "ghost of all": ["stack.ghost.chunk=0"],
    "h2o": ["stack.h2o.decode_every=0"],
}
TOKENS = 100


@dataclass
class Read:
    """What the layers of a compiled model saw of one prompt, and what they kept."""

    plan: Any
    queries: dict[int, torch.Tensor]  # of the layers that select [H_q, n, D], after rotation
    unrotated: dict[int, torch.Tensor]
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    kept: list[torch.Tensor]


def read_at_once(name: str, monkeypatch: pytest.MonkeyPatch, model: str = "llama") -> Read:
    from kvcompile.runtime import eviction

    read = Read(None, {}, {}, {}, {}, [])
    stock = eviction.observe

    def watched(kv: Any, queries: Any, unrotated: Any, step: Any, plan: Any, sinks: Any = None) -> Any:
        keys, values, _, _ = kv.held.sequence(0)
        read.keys[plan.index], read.values[plan.index] = keys.clone(), values.clone()
        read.queries[plan.index], read.unrotated[plan.index] = queries[0].clone(), unrotated[0].clone()
        return stock(kv, queries, unrotated, step, plan, sinks)

    monkeypatch.setattr(eviction, "observe", watched)
    policy = name.split()[0]
    overrides = [f"policy=[{policy}]", "budget=0.4", "kernels=sdpa", *STACKS[name]]
    compiled = kvcompile.compile(tiny_model(model), overrides=overrides)
    cache = compiled(tiny_ids(1, TOKENS)).past_key_values
    read.plan = compiled.kvcompile.plan
    read.kept = [torch.stack([at for _, _, at in layer.held.rows()]) for layer in cache.layers]
    return read


def in_chunks(rule: PromptRule, read: Read, layer: int, rotary: Any, ends: list[int], kept: int) -> torch.Tensor:
    """What stays of a layer's prompt that is read up to each of `ends`, as a worker of vLLM does it."""
    p, readings = read.plan.layers[layer], Readings()
    queries, block = read.queries[layer].transpose(0, 1), torch.tensor([7])
    for start, stop in itertools.pairwise([0, *ends]):
        chunk = Chunk(0, start, stop, stop == TOKENS, block)
        history = readings.of(chunk, 1)
        remember(rule, history, queries[start:stop], start, rotary)
        left = waiting(rule, history, stop, chunk.ends)
        so_far = read.keys[layer][:, :stop], read.values[layer][:, :stop]
        if left is not None:
            carry(rule, Prompt(*so_far, queries[start:stop], p.scale, p.softcap, history, rotary), left)
    known = readings.end(7), rotary
    assert not len(readings)
    return stay(rule, Prompt(read.keys[layer], read.values[layer], queries[-9:], p.scale, p.softcap, *known), kept)


@pytest.mark.parametrize("ends", [[100], [3, 50, 100], [1, 2, 16, 20, 47, 98, 100]], ids=len)
@pytest.mark.parametrize("name", STACKS)
def test_the_same_entries_stay_however_a_prompt_is_cut(
    name: str, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_at_once(name, monkeypatch)
    turns = rotations(tiny_config("llama"))
    for layer, rule in enumerate(rules(read.plan, 1)):
        assert rule is not None
        assert rule.remembers
        kept = read.plan.kept(layer, TOKENS)[0]
        assert torch.equal(in_chunks(rule, read, layer, turns[layer], ends, kept), read.kept[layer])


@pytest.mark.parametrize("model", ["llama", "qwen2", "qwen3", "smollm3", "gemma3_text", "gpt_neox"])
def test_queries_are_turned_back_to_what_they_were(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(model)
    plan = describe(config)
    windows = ",".join(str(p.index) for p in plan.layers if p.sliding_window)
    monkeypatch.setitem(STACKS, "expected_attention", [f"stack.expected_attention.skip_layers=[{windows}]"])
    read, at = read_at_once("expected_attention", monkeypatch, model), torch.arange(TOKENS)
    turns = rotations(config)
    for p in (plan.layers[layer] for layer in read.queries):
        rotary = turns[p.index]
        back = turned_back(read.queries[p.index], at, rotary)
        torch.testing.assert_close(back, read.unrotated[p.index].float(), rtol=1e-4, atol=1e-5)
        moved = not torch.allclose(read.queries[p.index], read.unrotated[p.index], atol=1e-3)
        assert moved == p.rotates


@pytest.mark.parametrize(
    ("model", "over", "words"),
    [
        ("glm", {}, "half a head apart"),
        ("cohere", {}, "half a head apart"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope 'dynamic'",
        ),
    ],
)
def test_a_way_to_turn_that_was_not_compared_is_refused(model: str, over: dict[str, Any], words: str) -> None:
    config = CONFIG_MAPPING[model](**(BASE | over))
    for name in ("expected_attention", "ghost", "keydiff"):
        plan = apply_stack(describe(config), build_stack([name], {}))
        if name == "keydiff":
            VLLM().refuse(plan, config)
        else:
            with pytest.raises(KvcompileError, match=words):
                VLLM().refuse(plan, config)


def test_a_prompt_begins_anew_in_a_block_that_another_one_left() -> None:
    readings = Readings()

    def chunk(block: int, start: int, stop: int) -> Chunk:
        return Chunk(0, start, stop, False, torch.tensor([block, block + 1]))

    (rule, *_) = rules(apply_stack(describe(tiny_config("llama")), build_stack(["expected_attention"], {})), 1)
    assert rule is not None
    turn = rotations(tiny_config("llama"))[0]
    remember(rule, readings.of(chunk(5, 0, 10), 2), torch.randn(10, 4, 16), 0, turn)  # then it is aborted
    again = readings.of(chunk(5, 0, 10), 2)
    assert again.sums is None
    remember(rule, again, torch.ones(10, 4, 16), 0, turn)
    assert readings.of(chunk(5, 10, 20), 2) is again
    assert again.sums is not None
    assert again.sums[0].count == 6  # without the first four
    readings.of(chunk(8, 0, 10), 2)
    readings.of(chunk(5, 20, 30), 2)
    readings.of(chunk(11, 0, 10), 2)  # one too many: that of block 8 was left longest
    assert len(readings) == 2
    assert readings.end(5) is again
    with pytest.raises(KvcompileError, match="from its first token on"):
        readings.of(chunk(8, 10, 20), 2)


def test_prefix_caching_goes_off_where_every_query_counts(caplog: pytest.LogCaptureFixture) -> None:
    from kvcompile.serving.vllm.plugin import _set_caching

    for name, off in (("expected_attention", True), ("ghost", True), ("snapkv", False)):
        config = tiny_config("llama")
        plan = apply_stack(describe(config), build_stack([name], {}))
        cache = SimpleNamespace(enable_prefix_caching=True)
        caplog.clear()
        _set_caching(cache, rules(plan, 1))
        assert cache.enable_prefix_caching is not off
        assert ("prefix caching is off" in caplog.text) is off
