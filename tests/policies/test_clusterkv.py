"""clusterkv in a model: nothing is lost, what is read is what was planned, and nobody else in the batch matters."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import HEADS, KIVI8, LAYERS, SNAPKV, Options, compiled, dense, kept_positions, off
from tiny import tiny_ids
from torch import Tensor

from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.recall import Entries
from kvcompile.policies.clusterkv import ClusterKV, KeyClusters
from kvcompile.runtime.cache import KVCache

PROMPT, NEW = 120, 24
FIELDS: dict[str, Any] = {"sinks": 2, "recent": 4, "every": 16, "tokens_per_cluster": 8, "skip_layers": [0]}
STACKS: dict[str, Options] = {
    "alone": {"clusterkv": {}},
    "kivi": {"clusterkv": {}, **KIVI8},
    "paged": {"clusterkv": {}, "paged": {"page": 4}},
    "offload": {"clusterkv": {}, "offload": {}},
    "kivi, paged": {"clusterkv": {}, **KIVI8, "paged": {"page": 8}},
    "int8": {"clusterkv": {}, "int8": {"residual": 5}},
    "snapkv": {"snapkv": {**SNAPKV, "budget": 60}, "clusterkv": {}},
    "adakv": {"adakv": {"budget": 60}, "clusterkv": {}},
    "gqa": {"gqa": {}, "clusterkv": {}},
}
every = pytest.mark.parametrize("name", STACKS)


def stack_of(name: str, budget: float, **fields: Any) -> Options:
    return {p: {**FIELDS, "budget": budget, **fields} if p == "clusterkv" else o for p, o in STACKS[name].items()}


def coded(name: str) -> bool:
    return "kivi" in name or "int8" in name


def without(name: str) -> Options:
    return {p: o for p, o in STACKS[name].items() if p != "clusterkv"}


def sdpa(stack: Options, **changes: Any) -> Any:
    """A compiled model for tests that are not about attention."""
    return compiled(stack, kernels="sdpa", **changes)


@torch.no_grad()
def read(model: Any, ids: Tensor, cuts: list[int], mask: Tensor | None = None, cache: Any = None) -> tuple[Tensor, Any]:
    """Logits of the parts of `ids` between `cuts`, then token by token; the cache."""
    borders = [0, *cuts, *range(cuts[-1] + 1, ids.shape[1] + 1)]
    logits = []
    for a, b in pairwise(borders):
        out = model(
            ids[:, a:b],
            attention_mask=None if mask is None else mask[:, :b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1), cache


def assert_whole(cache: Any) -> None:
    """Each row: sinks, groups back to back, recent; its positions are those of all tokens, once."""
    for layer in cache.layers:
        index, rows = layer.index, layer.held.rows()
        if index is None:
            assert layer.plan.recall is None
            continue
        for r, (_, _, positions) in enumerate(rows):
            covered = index.covered[r]
            table = index.table
            assert int(table.sizes[r].sum()) == covered
            assert int(table.ends[r]) == index.first + covered <= len(positions)
            count = index.counts[r]
            ends = index.first + table.sizes[r, :count].cumsum(0)
            assert torch.equal(ends.int() - table.sizes[r, :count], table.starts[r, :count])
            assert positions.unique().numel() == len(positions)
            assert torch.equal(positions[: index.first], positions.sort().values[: index.first]), "the sinks stay"


@every
def test_a_budget_that_holds_everything_is_as_if_there_were_none(name: str) -> None:
    ids = tiny_ids(2, PROMPT + NEW)
    got, cache = read(sdpa(stack_of(name, 10_000)), ids, [PROMPT])
    expected, _ = read(sdpa(without(name)), ids, [PROMPT])
    assert off(got, expected) < (0.02 if coded(name) else 1e-5)
    assert all(layer.index.table is not None for layer in cache.layers[1:])
    assert_whole(cache)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
def test_a_budget_that_holds_everything_is_dense(architecture: str) -> None:
    ids = tiny_ids(2, PROMPT + NEW)
    got, _ = read(compiled(stack_of("alone", 1.0), architecture), ids, [PROMPT])
    torch.testing.assert_close(got, read(dense(architecture), ids, [PROMPT])[0], atol=3e-5, rtol=1e-4)


@every
def test_a_small_budget_reads_some_and_keeps_all(name: str) -> None:
    ids = tiny_ids(2, PROMPT + NEW)
    got, cache = read(sdpa(stack_of(name, 16)), ids, [PROMPT])
    expected, whole = read(sdpa(without(name)), ids, [PROMPT])
    assert off(got[:, PROMPT:], expected[:, PROMPT:]) > 1e-3, "everything was read"
    assert cache.lengths() == whole.lengths()
    assert_whole(cache)


@every
def test_chunks_and_later_turns_lose_nothing(name: str) -> None:
    ids = tiny_ids(1, PROMPT + NEW)
    model = sdpa(stack_of(name, 16), prefill_chunk=50)
    _, cache = read(model, ids, [PROMPT])
    _, cache = read(model, tiny_ids(1, 60, 1), [30], cache=cache)
    assert_whole(cache)
    if not model.kvcompile.plan.selected:
        everything = list(range(PROMPT + NEW + 60))
        assert all(sorted(row) == everything for layer in kept_positions(cache) for row in layer)


@pytest.mark.parametrize("name", ["alone", "kivi", "kivi, paged", "offload", "snapkv"])
def test_a_row_of_a_padded_batch_is_what_it_is_alone(name: str) -> None:
    ids, mask = tiny_ids(3, PROMPT + NEW), torch.ones(3, PROMPT + NEW, dtype=torch.long)
    pads = (0, 23, 7)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    model = sdpa(stack_of(name, 16))
    together, cache = read(model, ids, [PROMPT], mask)
    batch = kept_positions(cache)
    for b, n in enumerate(pads):
        single, alone = read(model, ids[b : b + 1, n:], [PROMPT - n])
        for row, own in zip(batch, kept_positions(alone), strict=True):
            heads = len(own)
            assert row[b * heads : (b + 1) * heads] == own, "other clusters"
        assert off(together[b : b + 1, n:], single) < (2e-3 if coded(name) else 1e-5)


@pytest.mark.parametrize("tokens", [PROMPT, 121, 20])
@pytest.mark.parametrize("name", [n for n in STACKS if n not in ("adakv", "int8")])
def test_bytes_are_the_planned_ones(name: str, tokens: int) -> None:
    for budget, chunk in ((16, 0), (0.25, 0), (16, 50)):
        model = sdpa(stack_of(name, budget), prefill_chunk=chunk)
        if model.kvcompile.plan.selected and chunk:
            continue
        _, cache = read(model, tiny_ids(2, tokens), [tokens])
        planned = model.kvcompile.plan.bytes(2, tokens)
        assert cache.nbytes() == sum(r.bytes for r in planned)
        assert cache.index_bytes() == sum(r.index_bytes for r in planned)
        cache.reads = {}
        read(model, tiny_ids(2, 1, 3), [1], cache=cache)
        assert cache.reads == {r.index: r.read for r in planned}


@pytest.mark.parametrize("name", ["alone", "kivi", "kivi, paged"])
def test_a_thousand_decoded_tokens_are_all_there(name: str) -> None:
    """Layer by itself: a prompt, 1,000 steps, clusters of every 16, in the order of the text and out of it."""
    model = sdpa(stack_of(name, 16))
    plan = model.kvcompile.plan.layers[1]
    cache = KVCache(Plan("llama", "float32", (LayerPlan(**{**vars(plan), "index": 0, "owner": 0}),)))
    layer = cache.layers[0]
    torch.manual_seed(0)
    shuffled = 0
    for count in (50, *[1] * 1000):
        step = cache.begin(torch.zeros(2, count, dtype=torch.long), None)
        layer.append(*torch.randn(2, 2, HEADS, count, plan.head_dim), step.positions, None, 64)
        queries = torch.randn(2, plan.query_heads, count, plan.head_dim)
        chosen = layer.recall(queries, step, 0)
        assert (chosen is None) == (count > 1)
        if chosen is not None and step.tick % 97 == 0:
            newest = layer.held.lengths[0] - 1
            assert all(row[:2].tolist() == [0, 1] and int(row[-1]) == newest for row in chosen)
            layer.attend(queries, step, 0, chosen)
        layer.group_new(step)
        if step.prefill or step.tick % 32 == 0:
            layer.flush(64, step.prefill)
    assert_whole(cache)
    for _, _, positions in layer.held.rows():
        assert torch.equal(positions.sort().values, torch.arange(1050, dtype=positions.dtype))
        shuffled += int((positions.diff() < 0).sum())
    assert shuffled
    assert min(layer.index.counts) > 1000 // 16 // 2


@pytest.mark.parametrize("name", ["alone", "kivi", "snapkv"])
def test_beams_and_pages_go_together(name: str) -> None:
    ids = tiny_ids(2, PROMPT)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    plain = sdpa(stack_of(name, 16)).generate(ids, **options)
    paged = sdpa({**stack_of(name, 16), "paged": {"page": 8}}).generate(ids, **options)
    assert torch.equal(plain.sequences, paged.sequences)
    assert kept_positions(plain.past_key_values) == kept_positions(paged.past_key_values)
    assert_whole(plain.past_key_values)


@pytest.mark.parametrize("name", ["alone", "paged", "kivi", "offload"])
def test_a_fork_goes_its_own_way(name: str) -> None:
    """Clusters that one of them makes later leave the other's where they are."""
    model, ids = sdpa(stack_of(name, 16)), tiny_ids(1, PROMPT)
    _, cache = read(model, ids, [PROMPT])
    fork = cache.fork()
    first, _ = read(model, tiny_ids(1, NEW, 1), [1], cache=cache)
    second, _ = read(model, tiny_ids(1, NEW, 2), [1], cache=fork)
    for logits, seed, seen in ((first, 1, cache), (second, 2, fork)):
        alone, own = read(model, torch.cat((ids, tiny_ids(1, NEW, seed)), 1), [PROMPT])
        torch.testing.assert_close(logits, alone[:, PROMPT:], atol=1e-5, rtol=1e-5)
        assert kept_positions(seen) == kept_positions(own)


def test_a_choice_that_stands_for_several_steps_sees_all_new_tokens() -> None:
    ids = tiny_ids(1, PROMPT + NEW)
    got, cache = read(sdpa(stack_of("alone", 10_000, reuse=4)), ids, [PROMPT])
    expected, _ = read(dense(), ids, [PROMPT])
    assert off(got, expected) < 1e-5
    assert_whole(cache)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    ids = tiny_ids(2, PROMPT + NEW)
    model = assemble(shared(dense()), finish(Config(stack=stack_of("kivi", 16))))
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    assert torch.equal(read(loaded, ids, [PROMPT])[0], read(model, ids, [PROMPT])[0])
    assert loaded.kvcompile.plan == model.kvcompile.plan


@pytest.mark.parametrize("unit", [1, 8, 32])
@pytest.mark.parametrize("movable", [True, False])
def test_groups_are_whole_units(unit: int, movable: bool) -> None:
    keys = torch.randn(3, 320, 16, generator=torch.Generator().manual_seed(0))
    grouping = KeyClusters(20, 0)
    groups = grouping.divide(Entries(keys, unit, movable))
    assert groups.sizes.shape == (3, grouping.count(320, unit)) == (3, 320 // max(20, unit))
    assert (groups.sizes % unit == 0).all()
    assert groups.sizes.sum(1).tolist() == [320] * 3
    assert (groups.order is None) == (not movable)
    order = torch.arange(320).expand(3, -1) if groups.order is None else groups.order
    for r in range(3):
        for part, mean in zip(order[r].split(groups.sizes[r].tolist()), groups.representatives[r], strict=True):
            torch.testing.assert_close(mean, keys[r, part].mean(0) if len(part) else torch.zeros(16))


@pytest.mark.parametrize(
    ("entries", "unit", "groups"), [(1, 1, 1), (79, 1, 1), (160, 1, 2), (320, 1, 4), (320, 128, 2)]
)
def test_one_group_for_so_many_tokens(entries: int, unit: int, groups: int) -> None:
    assert KeyClusters(80, 0).count(entries, unit) == groups


def test_the_paper_s_defaults() -> None:
    policy = ClusterKV()
    assert (policy.sinks, policy.tokens_per_cluster, policy.every, policy.skip_layers) == (16, 80, 320, [0, 1])
    assert policy.grouping().count(policy.every, 1) == 4


@pytest.mark.parametrize(
    "stack",
    [
        {"clusterkv": {}, "quest": {}},
        {"snapkv": SNAPKV, "clusterkv": {}, **KIVI8},
        {"h2o": {"decode_every": 4}, "clusterkv": {}},
        {"clusterkv": {"tokens_per_cluster": 0}},
        {"clusterkv": {"seed": -1}},
    ],
)
def test_what_cannot_be_is_refused(stack: Options) -> None:
    with pytest.raises(KvcompileError, match="clusterkv"):
        compiled(stack)


def test_it_is_drawn_where_it_is() -> None:
    lines = [str(node.name) for node in sdpa(stack_of("alone", 16)).kvcompile.graph.graph.nodes]
    assert sum(line.startswith("recall") for line in lines) == LAYERS - 1
    assert sum(line.startswith("index") for line in lines) == LAYERS - 1
