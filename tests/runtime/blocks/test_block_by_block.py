"""A block transformer at work: whatever way its tokens come, it gives the logits of the oracle, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks_reference import logits_of
from blocks_working import LENGTHS, compiled, conversation, divided, padded, rows_of
from tiny import tiny_ids

from kvcompile.errors import KvcompileError
from kvcompile.runtime.blocks.cache import BlockCache

CLOSE = {"rtol": 0, "atol": 1e-12}
OPTIONS = {
    "as it is": {},
    "blocks of three": {"block": 3, "split": 1, "expansion": 1},
    "lookup": {"embedder": "lookup", "split": 3},
    "blocks of two": {"block": 2, "expansion": 3},
}


def oracle(model: Any, ids: torch.Tensor, architecture: str = "llama") -> torch.Tensor:
    plan = model.kvcompile.plan
    return logits_of(divided(architecture, plan), plan.blocks, ids)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_pass_chunks_and_tokens_give_the_same_logits(options: dict[str, Any]) -> None:
    model, ids = compiled({"block_transformer": options}), tiny_ids(1, 19)
    expected = oracle(model, ids[0])
    torch.testing.assert_close(model(ids).logits[0], expected, **CLOSE)
    for first, then in ((1, 1), (6, 1), (2, 2), (3, 3), (5, 5), (4, 9)):
        cache, sizes = model.new_cache(), [first, *[then] * ((19 - first) // then)]
        logits = [model(x, past_key_values=cache).logits[0] for x in torch.split(ids[:, : sum(sizes)], sizes, 1)]
        torch.testing.assert_close(torch.cat(logits), expected[: sum(sizes)], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite", "phi3"])
def test_every_llama_like_architecture(architecture: str) -> None:
    model, ids = compiled(architecture=architecture), tiny_ids(1, 10)
    expected = oracle(model, ids[0], architecture)
    cache = model.new_cache()
    logits = [model(x, past_key_values=cache).logits[0] for x in torch.split(ids, [6, 1, 1, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(logits), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [0, 3, 8])
def test_padded_batches_second_turns_and_decoding(chunk: int) -> None:
    """Each sequence counts its blocks from its own first token, and none depends on the others."""
    model = compiled(chunk=chunk)
    first, second = rows_of(LENGTHS), rows_of((7, 4, 2, 6, 3), seed=50)
    decoded = tiny_ids(5, 9, seed=99)
    logits, cache = conversation(model, [first, second], [decoded[:, :6], decoded[:, 6:]])
    for b, (prompt, turn) in enumerate(zip(first, second, strict=True)):
        whole = torch.cat((prompt, decoded[b, :6], turn, decoded[b, 6:]))
        n, m = len(prompt), len(turn)
        at = [*range(n - 1, n + 6), *range(n + 6 + m - 1, len(whole))]
        torch.testing.assert_close(logits[b], oracle(model, whole)[at], **CLOSE)
        assert cache.seen[b] == len(whole)
    assert cache.lengths()[0][::2] == [n // 4 for n in cache.seen]
    assert cache.lengths()[3][::2] == [3 + n % 4 for n in cache.seen]


@torch.no_grad()
def test_logits_of_chosen_columns_of_a_padded_batch() -> None:
    model = compiled()
    rows = rows_of((5, 13))
    ids, mask = padded(rows)
    every = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(model(ids, attention_mask=mask, logits_to_keep=3).logits, every[:, -3:], **CLOSE)
    columns = torch.tensor([12, 9], dtype=torch.int64, device="cpu")
    chosen = model(ids, attention_mask=mask, logits_to_keep=columns).logits
    torch.testing.assert_close(chosen, every[:, [12, 9]], **CLOSE)
    for b, row in enumerate(rows):
        torch.testing.assert_close(every[b, 13 - len(row) :], oracle(model, row), **CLOSE)


@torch.no_grad()
def test_greedy_search_and_beams_of_a_padded_batch_are_those_of_each_prompt_alone() -> None:
    model = compiled()
    rows = rows_of(LENGTHS)
    ids, mask = padded(rows)
    for how in ({"num_beams": 1}, {"num_beams": 3}):
        settings = {**how, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
        together = model.generate(ids, attention_mask=mask, **settings)
        for b, row in enumerate(rows):
            assert torch.equal(together[b, -7:], model.generate(row[None], **settings)[0, -7:])
    best = oracle(model, rows[-1])[-1].argmax()
    assert model.generate(rows[-1][None], max_new_tokens=1, do_sample=False)[0, -1] == best
    torch.manual_seed(0)
    assert model.generate(rows[-1][None], max_new_tokens=5, do_sample=True).shape[1] <= 35


@torch.no_grad()
def test_streaming_yields_each_token_as_it_comes() -> None:
    class Kept:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    model, ids, kept = compiled(), tiny_ids(1, 6), Kept()
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, streamer=kept)
    assert kept.tokens == [*out[0].tolist(), -1]


@torch.no_grad()
def test_a_fork_goes_its_own_way_in_the_middle_of_a_block() -> None:
    model, ids = compiled(), tiny_ids(1, 17)
    cache = model(ids[:, :6]).past_key_values
    fork = cache.fork()
    other = torch.cat((ids[:, :6], tiny_ids(1, 5, seed=9)), 1)
    torch.testing.assert_close(
        model(other[:, 6:], past_key_values=fork).logits[0], oracle(model, other[0])[6:], **CLOSE
    )
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits[0], oracle(model, ids[0])[6:], **CLOSE)
    cache.reset()
    assert (cache.seen, cache.get_seq_length(), cache.nbytes()) == ([], 0, 0)
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[0], oracle(model, ids[0]), **CLOSE)


@torch.no_grad()
def test_embeddings_may_come_in_place_of_ids() -> None:
    model, ids = compiled(), tiny_ids(1, 9)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)


@torch.no_grad()
def test_steps_that_complete_no_block_run_no_lower_layer() -> None:
    """And a prompt goes through the upper layers for the current block alone."""
    model, ids = compiled(), tiny_ids(2, 12)
    calls: list[tuple[str, tuple[int, ...]]] = []
    layers = model.model.layers
    hooks = [
        layers[i].mlp.register_forward_hook(lambda m, x, y, name=name: calls.append((name, tuple(x[0].shape[:2]))))
        for i, name in ((0, "lower"), (3, "upper"))
    ]
    try:
        cache = model(ids[:, :11], logits_to_keep=1).past_key_values
        assert calls == [("lower", (2, 2)), ("upper", (2, 6))]
        for token, expected in ((ids[:, 11:], ["lower", "upper"]), (ids[:, :1], ["upper"])):
            calls.clear()
            model(token, past_key_values=cache)
            assert [name for name, _ in calls] == expected
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_what_cannot_be_done_is_refused() -> None:
    model, ids = compiled(), tiny_ids(1, 9)
    cache = model(ids).past_key_values
    assert isinstance(cache, BlockCache)
    assert not cache.is_croppable
    cache.crop(0)
    with pytest.raises(KvcompileError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(KvcompileError, match="no state for each token"):
        model(ids, output_hidden_states=True)
    by_ids = compiled({"block_transformer": OPTIONS["lookup"]})
    with pytest.raises(KvcompileError, match="by its token ids"):
        by_ids(inputs_embeds=by_ids.get_input_embeddings()(ids))
    with pytest.raises(KvcompileError, match="one batch"):
        model(tiny_ids(2, 3), past_key_values=cache)


@torch.no_grad()
def test_bytes_are_counted_with_what_waits() -> None:
    model, ids = compiled(), tiny_ids(3, 10)
    cache = model(ids).past_key_values
    planned = model.kvcompile.plan.bytes(3, 10)
    assert cache.nbytes() == sum(row.bytes for row in planned) == 3 * 2 * (2 * 2 + 2 * 5) * 2 * 16 * 8
    waiting = 3 * 3 * 64 * 8
    assert cache.allocated() == sum(x.allocated() for x in (layer.held for layer in cache.layers)) + waiting
    assert cache.resident() == cache.allocated()
