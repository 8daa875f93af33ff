"""Layers that read another layer's keys and values: edges, weights, and transformers' own attention as the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from converted import converted, logits, parameters, planned, sharing
from tiny import ARCHITECTURES, layouts, tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.graph.wiring import appends, attends, observes, wiring
from kvcompile.policies.cla import uniform_owners
from kvcompile.policies.mlkv import nearest_owners
from kvcompile.structure.pairing import layer_similarity, matched

TOKENS, PROMPT = 44, 40  # more than twice the sliding window
ALIKE = [0, 1, 0, 1]  # layers of one kind in all tiny models but smollm3, whose last layer has no positions
OWNERS = {name: [0, 0, 2, 2] for name in ARCHITECTURES} | {
    "gemma2": ALIKE,
    "gemma3_text": ALIKE,
    "gpt_oss": ALIKE,
    "smollm3": [0, 0, 0, 3],
}


def steps(model: Any, ids: Any, mask: Any) -> Any:
    with torch.no_grad():
        out = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=_positions(mask)[:, :PROMPT])
        parts = [out.logits]
        for t in range(PROMPT, TOKENS):
            out = model(
                ids[:, t : t + 1],
                attention_mask=mask[:, : t + 1],
                position_ids=_positions(mask)[:, t : t + 1],
                past_key_values=out.past_key_values,
            )
            parts.append(out.logits)
    return torch.cat(parts, 1)


def _positions(mask: Any) -> Any:
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("pads", [0, 9], ids=["full", "left-padded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_readers_attend_to_their_owners_keys(name: str, pads: int) -> None:
    """Against transformers' attention and masks over a cache that hands layer i what layer owners[i] stored."""
    owners, model = OWNERS[name], tiny_model(name)
    ids, mask = tiny_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :pads] = 0
    expected = sharing(model, owners, ids, mask, PROMPT)
    got = steps(converted(model, {"cla": {"pattern": owners}}), ids, mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    assert (got - logits(model, ids)).abs().max() > 1e-2, "sharing must change something"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dead_projections_are_gone_from_graph_and_weights(name: str) -> None:
    owners, model = OWNERS[name], tiny_model(name)
    got = converted(model, {"cla": {"pattern": owners}})
    graph = got.kvcompile.graph.graph
    readers = [i for i, o in enumerate(owners) if o != i]
    assert wiring(graph) == dict(enumerate(owners))
    assert sorted(appends(graph)) == sorted(set(owners))
    called = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    held = {key.rpartition(".")[0] for key in got.state_dict()}
    for i in readers:
        for gone in ("k_proj", "v_proj", "k_norm"):
            assert not any(x.endswith(f"layers.{i}.self_attn.{gone}") for x in called | held)
        if name not in ("smollm3", "olmo2"):  # no positions; a cast after the rotation
            assert attends(graph)[i].args[0].target is ops.rope, "its own queries, rotated"
    heads = 4 if name == "gpt_neox" else 2
    gone = len(readers) * heads * 16 * 2 * 64
    biases = len(readers) * heads * 16 * 2 if name in ("qwen2", "gpt_neox", "gpt_oss") else 0
    norms = len(readers) * {"olmo2": 32, "qwen3": 16, "gemma3_text": 16}.get(name, 0)
    assert parameters(model) - parameters(got) == gone + biases + norms
    cache = got(tiny_ids(2, 30)).past_key_values
    assert [bool(lengths) for lengths in cache.lengths()] == [o == i for i, o in enumerate(owners)]
    assert cache.nbytes() == sum(r.bytes for r in got.kvcompile.plan.bytes(2, 30))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sharing_with_nobody_is_the_identity(name: str) -> None:
    model = tiny_model(name)
    got = converted(model, {"cla": {"share": 1}})
    assert got.kvcompile.plan.layers == describe(model.config).layers
    assert torch.equal(logits(got), logits(converted(model, {})))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "qwen2", "olmo2", "qwen3"])
def test_folding_layers_takes_the_mean_of_their_weights(name: str) -> None:
    """A model whose four layers have the means of all as keys and values, with sharing alone, is the same model."""
    from converted import edit

    from kvcompile.adapters.layout import Weights
    from kvcompile.structure.heads import fold_layers

    model = tiny_model(name)
    layers = [layout.read() for layout in layouts(model)]
    for fold, shares in (("mean", [0.25] * 4), ("successive", [0.125, 0.125, 0.25, 0.5])):
        folded = fold_layers(layers, fold)
        expected = sum(s * w.key.weight.double() for s, w in zip(shares, layers, strict=True)).float()
        torch.testing.assert_close(folded.key.weight, expected)

        def take(w: Weights, p: Any, folded: Weights = folded) -> Weights:
            return Weights(w.query, folded.key, folded.value, w.out, folded.head_norm)

        alike = edit(tiny_model(name), take)
        got = converted(model, {"cla": {"share": 4, "fold": fold}})
        torch.testing.assert_close(logits(got), logits(converted(alike, {"cla": {"share": 4}})))


def test_patterns_of_the_papers() -> None:
    assert uniform_owners(7, 3) == [0, 0, 0, 3, 3, 3, 6]
    assert uniform_owners(6, 2, "keep_ends") == [0, 1, 1, 3, 3, 5]
    assert uniform_owners(6, 2, "dense_front") == [0, 1, 2, 2, 2, 2]
    assert uniform_owners(6, 2, "dense_back") == [0, 0, 0, 0, 4, 5]
    for variant in ("uniform", "dense_front", "dense_back"):
        assert len(set(uniform_owners(20, 2, variant))) == 10
        assert uniform_owners(5, 1, variant) == list(range(5))
    assert nearest_owners(12, 5) == [0, 0, 2, 2, 4, 4, 4, 7, 7, 9, 9, 9]  # int(k 12 / 5)
    assert nearest_owners(4, 1) == [0, 0, 0, 0]


def test_mlkv_is_heads_then_layers() -> None:
    """The same as merging heads and then sharing layers by hand."""
    model = tiny_model("llama")
    got = converted(model, {"mlkv": {"layers": 2, "heads": 1, "fold": "mean"}})
    same = converted(model, {"mqa": {}, "cla": {"share": 2, "fold": "mean"}})
    assert torch.equal(logits(got), logits(same))
    assert got.kvcompile.plan.layers == same.kvcompile.plan.layers
    assert got.config.num_key_value_heads == 1


@pytest.mark.parametrize(
    ("name", "stack", "says"),
    [
        ("gemma2", {"cla": {}}, r"layer 1 reading layer 0: sliding window differ.*pattern=\[0,1,0,1\]"),
        ("smollm3", {"mlkv": {"layers": 2}}, r"layer 3 reading layer 2: rotary positions differ.*pattern=\[0,0,2,3\]"),
        ("llama", {"cla": {"pattern": [0, 0, 1, 1]}}, "an owner at or before it that owns itself"),
        ("llama", {"cla": {"pattern": [0, 3, 2, 3]}}, "an owner at or before it"),
        ("llama", {"cla": {"pattern": [0, 0]}}, "each of the 4 layers"),
        ("llama", {"cla": {}, "mlkv": {}}, "caches of layers can be shared only once"),
        ("llama", {"cla": {"share": 0}}, "share must be 1 or more"),
        ("llama", {"mlkv": {"layers": 5}}, "at most the model's 4"),
        ("llama", {"mlkv": {"heads": 3}}, "must divide the model's 2 KV heads"),
    ],
)
def test_what_cannot_be_shared_is_refused(name: str, stack: dict[str, Any], says: str) -> None:
    with pytest.raises(KvcompileError, match=says):
        planned(tiny_model(name), stack)


def test_a_suggested_pattern_works() -> None:
    for name in ("gemma2", "smollm3"):
        with pytest.raises(KvcompileError) as refusal:
            planned(tiny_model(name), {"cla": {}})
        pattern = [int(i) for i in str(refusal.value).rpartition("[")[2].partition("]")[0].split(",")]
        planned(tiny_model(name), {"cla": {"pattern": pattern}})


def test_a_selection_looks_at_the_queries_of_all_readers() -> None:
    """What layer 0 keeps is what the queries of layers 0 and 1 attend to; after layer 1 has read, not before."""
    stack = {"cla": {}, "snapkv": {"budget": 12, "window": 4, "kernel": 1, "sinks": 0}}
    model = converted(tiny_model("llama"), stack)
    graph = model.kvcompile.graph.graph
    order = [(n.target, n.args[-1]) for n in graph.nodes if n.target in (ops.observe, ops.attend, ops.compress)]
    assert order == [
        (ops.attend, 0),
        (ops.attend, 1),
        (ops.observe, 0),
        (ops.compress, 0),
        (ops.attend, 2),
        (ops.attend, 3),
        (ops.observe, 2),
        (ops.compress, 2),
    ]
    assert sorted(observes(graph)) == [0, 2]
    score, seen, asked = model.kvcompile.plan.layers[0].selection.score, [], []

    class Watching(type(score)):  # type: ignore[misc]
        def score(self, look: Any) -> Any:
            seen.append(look)
            return super().score(look)

    object.__setattr__(score, "__class__", Watching)
    cache = model.new_cache()
    inner = cache.backend.attend

    def watch(queries: Any, *others: Any) -> Any:
        asked.append(queries.states)
        return inner(queries, *others)

    cache.backend = replace(cache.backend, attend=watch)
    with torch.no_grad():
        model(tiny_ids(1, 30), past_key_values=cache)
    assert seen[0].queries.shape == (2, 4, 4, 16), "two heads of two queries, from two layers"
    for layer in (0, 1):
        mine = asked[layer][0, :, -4:].view(2, 2, 4, 16)
        torch.testing.assert_close(seen[0].queries[:, 2 * layer : 2 * layer + 2], mine)
    assert cache.lengths() == [[12, 12], [], [12, 12], []]


def test_pairs_are_chosen_by_what_layers_compute() -> None:
    """Layers 1 and 3 see and say nearly the same: `similar first` pairs them; both directions are full matchings."""
    model = tiny_model("llama")
    plan = describe(model.config)
    for by in ("kv", "activations"):
        table = layer_similarity(model, tiny_ids(1, 30), by)
        torch.testing.assert_close(table.diagonal(), torch.ones(4, dtype=torch.float64))
        assert torch.equal(table, table.T)
    table = torch.zeros(4, 4, dtype=torch.float64)
    table[1, 3] = table[3, 1] = 1
    assert matched(plan, table, 2) == [0, 1, 0, 1]
    assert matched(plan, -table, 2) == [0, 0, 2, 2]
    assert matched(plan, table, 3) == [0, 0, 2, 0]  # two owners, as in groups of three and one
    assert matched(plan, table, 4) == [0, 0, 0, 0]
    sliding = describe(tiny_model("gemma2").config)
    assert matched(sliding, torch.zeros(4, 4), 2) == [0, 1, 0, 1]


@pytest.mark.parametrize("best", [(0, 1, 0, 1), (0, 0, 2, 2)], ids=["similar", "dissimilar"])
def test_the_pattern_that_hurts_less_is_chosen(best: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from kvcompile.structure import pairing

    table = torch.zeros(4, 4, dtype=torch.float64)
    table[1, 3] = table[3, 1] = 1
    monkeypatch.setattr(pairing, "layer_similarity", lambda *_: table)
    monkeypatch.setattr(pairing, "divergence", lambda *a: float(tuple(p.owner for p in a[2].layers) != best))
    assert pairing.best_pattern(tiny_model("llama"), tiny_ids(1, 8), 2, "kv", "owner") == list(best)


@pytest.mark.parametrize("pairs", ["kv", "activations"])
def test_calibrated_pairs_are_kept_in_the_recipe(pairs: str) -> None:
    from kvcompile.calibration.activations import calibration_ids
    from kvcompile.structure.pairing import divergence, with_owners

    original, tokenizer = tiny_model("llama"), tiny_tokenizer()
    overrides = ["policy=[cla]", f"stack.cla.pairs={pairs}", "stack.cla.tokens=64"]
    model = kvcompile.compile(tiny_model("llama"), overrides=overrides, tokenizer=tokenizer)
    pattern = [p.owner for p in model.kvcompile.plan.layers]
    assert f"pattern:\n    - {pattern[0]}\n    - {pattern[1]}" in model.kvcompile.recipe
    assert len(set(pattern)) == 2
    ids, plan = calibration_ids(tokenizer, 64, "cla"), describe(original.config)
    table = layer_similarity(original, ids, pairs)
    hurt = {
        tuple(owners): divergence(original, ids, with_owners(plan, owners, "owner"))
        for owners in (matched(plan, table, 2), matched(plan, -table, 2))
    }
    assert tuple(pattern) == min(hurt, key=hurt.__getitem__)
    with pytest.raises(KvcompileError, match="cla needs a tokenizer"):
        kvcompile.compile(tiny_model("llama"), overrides=overrides)
