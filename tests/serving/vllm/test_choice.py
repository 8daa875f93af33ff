"""What stays of a prompt in vLLM is what the compiled model keeps of it, layer by layer and head by head."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_ids, tiny_model

import kvcompile
from kvcompile.serving.vllm.choice import Prompt, stay
from kvcompile.serving.vllm.rules import rules

STACKS = ["knorm", "keydiff", "snapkv", "dropkv", "streaming", "pyramidkv"]


@pytest.mark.parametrize("name", STACKS)
def test_the_same_entries_stay_as_in_the_compiled_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.runtime import eviction

    seen: dict[int, object] = {}
    stock = eviction._observation

    def watched(layer: object, b: int, score: object, without: int = 0) -> object:
        found = stock(layer, b, score, without)  # type: ignore[arg-type]
        seen[found.layer] = found
        return found

    monkeypatch.setattr(eviction, "_observation", watched)
    window = ["stack.snapkv.window=8"] if name == "snapkv" else []
    calm = ["stack.streaming.decode_every=0"] if name == "streaming" else []
    model = kvcompile.compile(
        tiny_model(), overrides=[f"policy=[{name}]", "budget=0.4", "kernels=sdpa", *window, *calm]
    )
    plan, ids = model.kvcompile.plan, tiny_ids(1, 100)
    cache = model(ids).past_key_values
    for p, rule in zip(plan.layers, rules(plan, len(plan.layers)), strict=True):
        kept = plan.kept(p.index, ids.shape[1])
        assert rule is not None
        assert kept is not None
        o = seen[p.index]
        queries = o.queries.permute(2, 0, 1, 3).flatten(1, 2)  # type: ignore[attr-defined]
        chosen = stay(rule, Prompt(o.keys, o.values, queries, p.scale, p.softcap), kept[0])  # type: ignore[attr-defined]
        assert torch.equal(chosen, torch.stack([positions for _, _, positions in cache.layers[p.index].held.rows()]))


def test_protected_tokens_stay_whatever_their_scores() -> None:
    model = kvcompile.compile(tiny_model(), overrides=["policy=[knorm]", "budget=0.2", "kernels=sdpa"])
    (rule, *_) = rules(model.kvcompile.plan, 1)
    assert rule is not None
    keys = torch.ones(2, 50, 16)
    keys[:, :4] = 100  # the sinks have the largest norms, which rank last
    prompt = Prompt(keys, keys, torch.zeros(0, 4, 16), 1.0)
    assert stay(rule, prompt, 10)[:, :4].tolist() == [[0, 1, 2, 3]] * 2
