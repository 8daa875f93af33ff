"""What stays of a prompt in vLLM is what the compiled model keeps of it, layer by layer and head by head."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.runtime.history import QueryHistory
from kvcompile.serving.vllm.choice import Prompt, carry, remember, stay
from kvcompile.serving.vllm.rules import PromptRule, rules
from kvcompile.serving.vllm.turning import rotations
from kvcompile.stack import apply_stack, build_stack

STACKS = ["knorm", "keydiff", "snapkv", "dropkv", "streaming", "pyramidkv", "tova"]


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
    calm = [f"stack.{name}.decode_every=0"] if name in ("streaming", "tova") else []
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


@pytest.mark.parametrize("name", [*(name for name in STACKS if name != "tova"), "expected_attention", "ghost", "h2o"])
def test_heads_of_one_rank_keep_what_they_keep_in_the_whole_model(name: str) -> None:
    """Tensor parallelism: a rank has some KV heads and the query heads of their groups, and asks no other rank."""
    heads, group, tokens, dim = 4, 3, 200, 16
    stack = build_stack([name], {name: {"decode_every": 0} if name in ("streaming", "h2o") else {}})
    (rule, *_) = rules(apply_stack(describe(tiny_config("llama")), stack), 2)
    assert rule is not None
    draw = torch.Generator().manual_seed(4)
    keys, values = torch.randn(2, heads, tokens, dim, generator=draw)
    queries = torch.randn(tokens, heads * group, dim, generator=draw)

    def kept(some: slice) -> torch.Tensor:
        own = queries[:, some.start * group : some.stop * group]
        return stay(rule, prompt(rule, keys[some], values[some], own), 90)

    whole = kept(slice(0, heads))
    for ranks in (2, 4):
        each = heads // ranks
        parts = [kept(slice(rank * each, (rank + 1) * each)) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert (len({tuple(row) for row in whole.tolist()}) == 1) is (name == "streaming")  # else each head has its own


def test_what_a_rank_could_not_tell_is_refused() -> None:
    from kvcompile.serving.vllm.plugin import _require_heads
    from kvcompile.serving.vllm.served import Served

    for name, ranks, words in (
        ("snapkv", 2, None),
        ("snapkv", 4, "whole KV heads"),
        ("tova", 1, None),
        ("tova", 2, "all of a layer"),
    ):
        plan = apply_stack(describe(tiny_config("llama")), build_stack([name], {}))  # 2 KV heads a layer
        with pytest.raises(KvcompileError, match=words) if words else nullcontext():
            _require_heads(Served(plan, rules(plan, 1)), ranks)


def prompt(rule: PromptRule, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor) -> Prompt:
    """One that was read in one chunk."""
    history, rotary = QueryHistory(), rotations(tiny_config("llama"))[0]
    read = Prompt(keys, values, queries, keys.shape[-1] ** -0.5, None, history, rotary)
    if rule.remembers:
        remember(rule, history, queries, 0, rotary)
    if history.uncounted(0):
        carry(rule, read, 0)
    return read
