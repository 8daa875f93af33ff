"""A replay counts what its definition says, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import HEADS, LAYERS, compiled, dense, kept_positions
from repeating import CHUNK, CLOSING, FIRST, LATER, OPTIONS, OVERLAP, SINKS, expected_scores, prefilled, replays
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.runtime.replay import finish, replay

TOKENS, BUDGET = 60, 24


def stack(**more: Any) -> dict[str, dict[str, Any]]:
    return {"kvzip": {"budget": BUDGET, **OPTIONS, **more}}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What every layer carries after a replay, before anything is dropped: per layer and sequence `[H_kv, n]`."""

    def scores(model: Any, ids: Tensor, mask: Tensor | None = None) -> list[list[Tensor]]:
        with monkeypatch.context() as patch:
            patch.setattr(finish, "select", lambda *_: None)
            cache = prefilled(model, ids, mask)
        return [layer.history.carried for layer in cache.layers]

    return scores


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """What replays read: (first, stop, ids) of each piece."""
    seen: list[tuple[int, int, list[int]]] = []
    inner = replay.read

    def reading(compiled: Any, copy: Any, piece: Any, normed: bool) -> Any:
        seen.append((piece.first, piece.stop, piece.ids.tolist()))
        return inner(compiled, copy, piece, normed)

    monkeypatch.setattr(replay, "read", reading)
    return seen


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "qwen3", "olmo2", "smollm3", "granite"])
def test_scores_are_those_of_a_plain_model_in_float64(architecture: str, normalise: bool, counted: Any) -> None:
    """Windows, soft-caps, norms, scales and layers without rotation included."""
    ids = tiny_ids(1, TOKENS)
    model = compiled(stack(normalise=normalise, budget=12), architecture, kernels="sdpa")
    expected = expected_scores(tiny_model(architecture), ids[0].tolist(), HEADS, normalise)
    for got, wanted in zip(counted(model, ids), expected, strict=True):
        torch.testing.assert_close(got[0].double(), wanted, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gpt_oss", "phi3"])
def test_the_best_scores_stay(architecture: str, counted: Any) -> None:
    """Sinks, the newest tokens, and the highest of the others: in every row."""
    ids, model = tiny_ids(1, TOKENS), compiled(stack(), architecture, kernels="sdpa")
    scores, cache = counted(model, ids), prefilled(model, ids)
    always = {*range(SINKS), *range(TOKENS - 4, TOKENS)}
    for p, of_layer, rows in zip(cache.plan.layers, scores, kept_positions(cache), strict=True):
        if p.sliding_window:
            continue
        for numbers, kept in zip(of_layer[0], rows, strict=True):
            others = sorted(set(range(TOKENS)) - always, key=lambda j: -float(numbers[j]))
            assert set(kept) == always | set(others[: BUDGET - len(always)])


def test_a_batch_is_scored_as_its_sequences_are(counted: Any) -> None:
    ids, lengths = tiny_ids(3, TOKENS), (TOKENS, 41, 7)
    model = compiled(stack(), kernels="sdpa")
    for side in ("left", "right"):
        mask = torch.zeros_like(ids)
        places = [slice(TOKENS - n, TOKENS) if side == "left" else slice(n) for n in lengths]
        for b, place in enumerate(places):
            mask[b, place] = 1
        together = counted(model, ids, mask)
        cache = prefilled(model, ids, mask)
        for b, (place, n) in enumerate(zip(places, lengths, strict=True)):
            alone = ids[b : b + 1, place]
            if n > BUDGET:
                for got, wanted in zip(together, counted(model, alone), strict=True):
                    torch.testing.assert_close(got[b][:, :n], wanted[0], rtol=1e-4, atol=1e-6)
            rows = [layer[b * HEADS : (b + 1) * HEADS] for layer in kept_positions(cache)]
            assert rows == kept_positions(prefilled(model, alone))


def test_nothing_of_a_replay_stays() -> None:
    """Keys and values are those of the text, positions go on where it ended, and pages are given back."""
    ids = tiny_ids(1, TOKENS + 1)
    with torch.no_grad():
        full = dense()(ids).past_key_values
    for stored in ({}, {"paged": {"page": 4}}):
        model = compiled({**stack(), **stored}, kernels="sdpa")
        cache = prefilled(model, ids[:, :TOKENS])
        assert cache.read_again == sum(len(read) for _, _, read in replays(ids[0, :TOKENS].tolist()))
        assert (cache.seen, cache.get_seq_length(), cache.withheld) == ([TOKENS], TOKENS, None)
        assert all(len(kept) == BUDGET and kept[-1] == TOKENS - 1 for rows in kept_positions(cache) for kept in rows)
        alive = sum(x.untyped_storage().nbytes() for layer in cache.layers for x in layer.held.tensors())
        assert alive == cache.allocated()
        cache = prefilled(model, ids[:, TOKENS:], cache=cache)
        for layer, reference in zip(cache.layers[:1], full.layers[:1], strict=True):
            for h, (keys, values, at) in enumerate(layer.held.rows()):
                torch.testing.assert_close(keys, reference.keys[0, h, at.long()], atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(values, reference.values[0, h, at.long()], atol=1e-5, rtol=1e-5)


def test_a_text_is_repeated_in_pieces_by_their_prompts(repeated: list[Any]) -> None:
    text = tiny_ids(1, TOKENS)[0].tolist()
    prefilled(compiled(stack(), kernels="sdpa"), torch.tensor([text]))
    assert repeated == replays(text)
    assert repeated[0] == (0, CHUNK, [*FIRST, *CLOSING, *text[:CHUNK]])
    assert repeated[1][2] == [*LATER, *text[CHUNK - OVERLAP : CHUNK], *CLOSING, *text[CHUNK : 2 * CHUNK]]


def test_a_second_turn_repeats_what_came_since_the_selection(repeated: list[Any]) -> None:
    """The answer of the first turn and the new question; numbers of before stay, so that old and new compete."""
    ids, model = tiny_ids(1, 2 * TOKENS), compiled(stack(), kernels="sdpa")
    text = ids[0].tolist()
    cache = prefilled(model, ids[:, :TOKENS])
    for t in range(TOKENS, TOKENS + 5):
        prefilled(model, ids[:, t : t + 1], cache=cache)
    before = [layer.history.carried[0].clone() for layer in cache.layers]
    assert len(repeated) == len(replays(text[:TOKENS]))
    held, repeated[:] = kept_positions(cache), []
    prefilled(model, ids[:, TOKENS + 5 : TOKENS + 25], cache=cache)
    new = text[TOKENS : TOKENS + 25]
    assert repeated == replays(new, TOKENS, text[TOKENS - OVERLAP : TOKENS])
    for layer, numbers, old, now in zip(cache.layers, before, held, kept_positions(cache), strict=True):
        for h in range(HEADS):
            known = dict(zip(old[h], numbers[h].tolist(), strict=False))
            carried = dict(zip(now[h], layer.history.carried[0][h].tolist(), strict=True))
            assert len(now[h]) == BUDGET
            assert all(carried[at] == known[at] for at in now[h] if at < TOKENS)
            assert any(at >= TOKENS for at in now[h])


def test_a_text_within_the_budget_is_repeated_once_it_is_not(repeated: list[Any]) -> None:
    ids, model = tiny_ids(1, TOKENS), compiled(stack(), kernels="sdpa")
    cache = prefilled(model, ids[:, :20])
    assert not repeated
    prefilled(model, ids[:, 20:], cache=cache)
    assert repeated == replays(ids[0].tolist())


def test_chunks_of_a_prefill_wait_for_the_last_or_are_replayed_each(repeated: list[Any]) -> None:
    ids = tiny_ids(1, TOKENS)
    once = prefilled(compiled(stack(), kernels="sdpa"), ids)
    read = list(repeated)
    waits = prefilled(compiled(stack(), kernels="sdpa", prefill_chunk=25), ids)
    assert repeated == read * 2
    assert kept_positions(waits) == kept_positions(once)
    repeated[:] = []
    each = compiled(stack(between_chunks=True), kernels="sdpa", prefill_chunk=25)
    cache = prefilled(each, ids)
    text = ids[0].tolist()
    ends = [(25, 50), (50, 60)]
    assert repeated == [
        *replays(text[:25]),
        *(x for a, b in ends for x in replays(text[a:b], a, text[a - OVERLAP : a])),
    ]
    assert cache.lengths() == [[BUDGET] * HEADS] * LAYERS


def test_decoded_tokens_are_repeated_where_they_may_be_dropped(repeated: list[Any]) -> None:
    ids, model = tiny_ids(1, TOKENS + 8), compiled(stack(decode_every=4), kernels="sdpa")
    text = ids[0].tolist()
    cache = prefilled(model, ids[:, :TOKENS])
    repeated[:] = []
    for t in range(TOKENS, TOKENS + 8):
        prefilled(model, ids[:, t : t + 1], cache=cache)
    turns = [(TOKENS, TOKENS + 4), (TOKENS + 4, TOKENS + 8)]
    assert repeated == [x for a, b in turns for x in replays(text[a:b], a, text[a - OVERLAP : a])]
    assert cache.lengths() == [[BUDGET] * HEADS] * LAYERS


def test_beams_and_forks_go_on_with_their_own_text(repeated: list[Any]) -> None:
    ids, model = tiny_ids(2, TOKENS), compiled(stack(), kernels="sdpa")
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape == (2, TOKENS + 6)
    cache = prefilled(model, ids[:1])
    other = cache.fork()
    prefilled(model, ids[1:, :3], cache=other)
    prefilled(model, ids[:1, :3], cache=cache)
    assert cache.seen == other.seen == [TOKENS + 3]
    assert repeated[-2][2][-3:] == ids[1, :3].tolist()
    assert repeated[-1][2][-3:] == ids[0, :3].tolist()


def test_layers_that_select_nothing_are_read_again_with_the_others() -> None:
    """With a window, they drop nothing of the copy between two pieces; encoded, they are encoded after the replay."""
    ids, skip = tiny_ids(1, TOKENS), [0, 3]
    for architecture, more in (("gemma2", {}), ("llama", {"int8": {"residual": 5}})):
        model = compiled({**stack(skip_layers=skip), **more}, architecture, kernels="sdpa")
        cache = prefilled(model, ids)
        for p, lengths in zip(model.kvcompile.plan.layers, cache.lengths(), strict=True):
            assert lengths == list(model.kvcompile.plan.kept(p.index, TOKENS))
        assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, TOKENS))


def test_tokens_are_taken_back_with_what_they_said(repeated: list[Any]) -> None:
    ids, model = tiny_ids(1, TOKENS + 6), compiled(stack(), kernels="sdpa")
    cache = prefilled(model, ids[:, :TOKENS])
    for t in range(TOKENS, TOKENS + 3):
        prefilled(model, ids[:, t : t + 1], cache=cache)
    cache.crop(-2)
    repeated[:] = []
    prefilled(model, ids[:, TOKENS + 3 :], cache=cache)
    assert repeated[0][2][-4:] == [int(ids[0, TOKENS]), *ids[0, TOKENS + 3 :].tolist()]
