"""What must not matter: who else is in the batch, how the prompt is cut into chunks, which beam a cache came from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import TABLE, Row, compiled, dense, kept_positions
from tiny import tiny_ids
from torch import Tensor

TOKENS, BUDGET, NEW = 60, 24, 6
LENGTHS = (TOKENS, 41, 29)  # of the sequences in the padded batch; the shortest is still longer than the budget

every = pytest.mark.parametrize(("name", "row"), TABLE.items(), ids=TABLE)
EXACT = {name: row for name, row in TABLE.items() if not row.encoded}  # rounding may prefer another beam


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sequences `ids[b, :LENGTHS[b]]` left-padded to one width, and their mask."""
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for b, n in enumerate(LENGTHS):
        out[b, -n:], mask[b, -n:] = ids[b, :n], 1
    return out, mask


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)


def rows_of(cache: Any, b: int, batch: int) -> list[list[list[int]]]:
    """True positions held by sequence `b`, per layer and head."""
    per = [len(layer) // batch for layer in kept_positions(cache)]
    return [layer[b * n : (b + 1) * n] for layer, n in zip(kept_positions(cache), per, strict=True)]


def same_alone(model: Any, **options: Any) -> None:
    """Generates from a left-padded batch, and from each of its sequences alone: same tokens, same entries kept."""
    ids = tiny_ids(len(LENGTHS), TOKENS, seed=3)
    together = generate(model, *padded(ids), **options)
    for b, n in enumerate(LENGTHS):
        alone = generate(model, ids[b : b + 1, :n], **options)
        assert together.sequences[b, TOKENS:].tolist() == alone.sequences[0, n:].tolist()
        kept = rows_of(together.past_key_values, b, len(LENGTHS))
        assert kept == rows_of(alone.past_key_values, 0, 1)


@every
def test_a_padded_batch_is_its_sequences_alone(name: str, row: Row) -> None:
    same_alone(compiled(row.fields(BUDGET)))


@pytest.mark.parametrize("name", ["adakv over snapkv", "h2o", "pyramidkv", "zigzag", "corm"])
def test_a_padded_batch_is_its_sequences_alone_where_layers_slide(name: str) -> None:
    same_alone(compiled(TABLE[name].fields(BUDGET), "gemma2"))


@every
def test_a_padded_batch_is_its_sequences_alone_with_shares_and_decode_eviction(name: str, row: Row) -> None:
    same_alone(compiled(row.fields(0.6, decode_every=2)))


@every
def test_chunks_do_not_change_the_selection(name: str, row: Row) -> None:
    """Scores of a prompt read in chunks, evicted once at its end, are those of the prompt read at once.

    Chunks shorter than the windows of scores; longer ones: `test_chunks_of_a_padded_batch`.
    """
    ids = tiny_ids(1, TOKENS, seed=5)
    once = compiled(row.fields(BUDGET, between_chunks=False))
    cut = compiled(row.fields(BUDGET, between_chunks=False), prefill_chunk=7)
    expected, got = generate(once, ids), generate(cut, ids)
    assert kept_positions(got.past_key_values) == kept_positions(expected.past_key_values)
    assert got.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("name", ["expected_attention", "h2o", "snapkv", "zigzag"])
@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
def test_chunks_do_not_change_the_selection_elsewhere(name: str, architecture: str) -> None:
    ids, fields = tiny_ids(1, TOKENS, seed=5), TABLE[name].fields(BUDGET, between_chunks=False)
    expected = generate(compiled(fields, architecture), ids)
    got = generate(compiled(fields, architecture, prefill_chunk=16), ids)
    assert kept_positions(got.past_key_values) == kept_positions(expected.past_key_values)
    assert got.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("between", [False, True])
@every
def test_chunks_of_a_padded_batch(name: str, row: Row, between: bool) -> None:
    """Chunks cut a padded sequence where they cut it alone, and without evictions between them do not matter."""
    model = compiled(row.fields(BUDGET, between_chunks=between), prefill_chunk=16)
    whole = model if between else compiled(row.fields(BUDGET))
    ids = tiny_ids(len(LENGTHS), TOKENS, seed=3)
    together = generate(model, *padded(ids))
    for b, n in enumerate(LENGTHS):
        alone = generate(whole, ids[b : b + 1, :n])
        assert rows_of(together.past_key_values, b, len(LENGTHS)) == rows_of(alone.past_key_values, 0, 1)
        assert together.sequences[b, TOKENS:].tolist() == alone.sequences[0, n:].tolist()


@pytest.mark.parametrize(("name", "row"), EXACT.items(), ids=EXACT)
def test_beam_search_with_all_tokens_is_that_of_the_model(name: str, row: Row) -> None:
    ids, beams = tiny_ids(2, TOKENS, seed=7), {"num_beams": 3, "num_return_sequences": 2}
    got = generate(compiled(row.fields(1.0, **row.everything)), ids, **beams)
    expected = generate(dense(), ids, **beams)
    assert got.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)


@every
def test_beam_search_of_a_padded_batch_is_that_of_its_sequences(name: str, row: Row) -> None:
    """Each beam carries its own rows and, where the policy evicts while decoding, its own scores."""
    model, ids = compiled(row.fields(BUDGET, decode_every=2)), tiny_ids(len(LENGTHS), TOKENS, seed=3)
    together = generate(model, *padded(ids), num_beams=3)
    for b, n in enumerate(LENGTHS):
        alone = generate(model, ids[b : b + 1, :n], num_beams=3)
        assert together.sequences[b, TOKENS:].tolist() == alone.sequences[0, n:].tolist()


@every
def test_a_second_turn_on_the_same_cache_is_within_budget(name: str, row: Row) -> None:
    """Multi-turn: the next prompt is appended at its true positions and the whole is selected anew."""
    model, ids = compiled(row.fields(BUDGET)), tiny_ids(1, 2 * TOKENS, seed=9)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        model(ids[:, TOKENS:], past_key_values=cache)
    held = sum(sum(lengths) for lengths in cache.lengths())
    if row.split != "threshold":
        assert held == row.promised(BUDGET, 2 * TOKENS)
    for layer in kept_positions(cache):
        for at in layer:
            assert at == sorted(set(at))
            assert set(at) >= {*range(2), *range(2 * TOKENS - row.newest(BUDGET), 2 * TOKENS)}
            assert any(p >= TOKENS for p in at)
