"""Values of what stays are those that the definition says, straight from a plain model, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import HEADS, compiled, kept_positions
from repeating import OPTIONS, doubled, prefilled, read, replays
from tiny import tiny_ids, tiny_model
from torch import Tensor

from kvcompile.kernels.codecs import decode, encode
from kvcompile.plan.storage import PLAIN, Codec, Storage
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.replay.refit import Fit, _count

TOKENS, RECENT, RIDGE = 60, 4, 0.5
FIT = {**{key: OPTIONS[key] for key in ("chunk", "overlap", "ids")}, "recent": RECENT, "ridge": RIDGE}
SCORE = {"snapkv": {"budget": 20, "window": 4, "kernel": 3}}
ADAPTIVE = {**SCORE, "adakv": {}}


def stack(score: dict[str, Any] = ADAPTIVE, after: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {**score, "attention_matching": {**FIT, **more}, **(after or {})}


def expected(architecture: str, text: list[int], kept: list[list[list[int]]], most: float = 0.5) -> list[list[Tensor]]:
    """Values `[m, D]` by layer and head of the entries `kept`, in float64."""
    model, n = doubled(tiny_model(architecture)), len(text)
    squares: dict[tuple[int, int], Tensor] = {}
    lost: dict[tuple[int, int], Tensor] = {}
    seen = None
    for first, stop, repeated in replays(text):
        seen = read(model, [*text, *repeated])
        asked = range(n + len(repeated) - (stop - first), n + len(repeated))
        for layer, attention in enumerate(seen.attention):
            values = torch.unflatten(seen.values[layer], -1, (HEADS, -1))
            for h in range(HEADS):
                rows = kept[layer][h]
                stay = [j in rows or j >= n for j in range(n + len(repeated))]
                group = attention.view(HEADS, -1, *attention.shape[1:])[h]
                p = torch.cat([group[:, q] for q in asked])
                left = torch.where(torch.tensor(stay), p, 0.0)
                left = left / left.sum(-1, keepdim=True)
                free = [j for j in rows if j < n - RECENT]
                a, r = left[:, free], (p - left) @ values[:, h]
                key = layer, h
                squares[key] = squares.get(key, 0) + a.T @ a
                lost[key] = lost.get(key, 0) + a.T @ r
    out = []
    for layer, of_layer in enumerate(kept):
        values = torch.unflatten(seen.values[layer], -1, (HEADS, -1))
        out.append([])
        for h, rows in enumerate(of_layer):
            new = values[rows, h].clone()
            if len(rows) <= most * n:
                m = squares[layer, h]
                free = [i for i, j in enumerate(rows) if j < n - RECENT]
                ridge = RIDGE * m.diagonal().mean() * torch.eye(len(m), dtype=torch.float64)
                new[free] += torch.linalg.solve(m + ridge, lost[layer, h])
            out[-1].append(new)
    return out


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "smollm3"])
@pytest.mark.parametrize("after", [{}, {"paged": {"page": 4}}, {"offload": {}}], ids=["ragged", "paged", "offload"])
def test_values_are_fitted_as_defined(architecture: str, after: dict[str, Any]) -> None:
    """Over heads that keep different numbers, windows, soft-caps, layers without rotation; keys stay as they were."""
    ids = tiny_ids(1, TOKENS)
    cache = prefilled(compiled(stack(after=after), architecture, kernels="sdpa"), ids)
    plain = prefilled(compiled({**ADAPTIVE, **after}, architecture, kernels="sdpa"), ids)
    wanted = expected(architecture, ids[0].tolist(), kept_positions(cache))
    assert kept_positions(cache) == kept_positions(plain)
    assert cache.nbytes() == plain.nbytes()
    changed = 0
    for layer, reference, values in zip(cache.layers, plain.layers, wanted, strict=True):
        for row, old, new in zip(layer.held.rows(), reference.held.rows(), values, strict=True):
            torch.testing.assert_close(row[0], old[0])
            torch.testing.assert_close(row[1].double(), new, rtol=1e-3, atol=2e-4)
            changed += int(not torch.equal(row[1], old[1]))
    assert changed >= 4


def test_a_batch_is_fitted_as_its_sequences_are() -> None:
    """Padding on either side, and a sequence so short that nothing of it is dropped."""
    ids, lengths = tiny_ids(3, TOKENS), (TOKENS, 41, 7)
    model = compiled(stack(), kernels="sdpa")
    for side in ("left", "right"):
        mask = torch.zeros_like(ids)
        places = [slice(TOKENS - n, TOKENS) if side == "left" else slice(n) for n in lengths]
        for b, place in enumerate(places):
            mask[b, place] = 1
        together = prefilled(model, ids, mask)
        for b, place in enumerate(places):
            alone = prefilled(model, ids[b : b + 1, place])
            for layer, own in zip(together.layers, alone.layers, strict=True):
                rows = layer.held.rows()[b * HEADS : (b + 1) * HEADS]
                for got, wanted in zip(rows, own.held.rows(), strict=True):
                    assert got[2].tolist() == wanted[2].tolist()
                    torch.testing.assert_close(got[1], wanted[1], rtol=1e-3, atol=1e-4)


def test_queries_are_answered_better_than_before() -> None:
    """What the fit is for: the model's next logits are nearer to the uncompressed ones when it reads the text again."""
    text = tiny_ids(1, TOKENS)
    again = torch.cat([torch.tensor([replays(text[0].tolist())[0][2][:3]]), text], 1)
    with torch.no_grad():
        full = tiny_model("llama")(torch.cat([text, again], 1)).logits[:, TOKENS:]
        off = []
        for options in (ADAPTIVE, stack(ridge=0.01)):
            model = compiled(options, kernels="sdpa")
            out = model(again, past_key_values=prefilled(model, text)).logits
            off.append(float((out - full).square().mean()))
    assert off[1] < off[0]


def test_a_second_turn_leaves_encoded_entries_alone() -> None:
    ids = tiny_ids(1, TOKENS + 30)
    model = compiled(stack(after={"int8": {"residual": 0}}), kernels="sdpa")
    cache = prefilled(model, ids[:, :TOKENS])
    before = [[(at.tolist(), values.clone()) for _, values, at in layer.held.rows()] for layer in cache.layers]
    prefilled(model, ids[:, TOKENS:], cache=cache)
    for layer, old in zip(cache.layers, before, strict=True):
        for (_, values, at), (known, was) in zip(layer.held.rows(), old, strict=True):
            places = dict(zip(known, was, strict=True))
            kept = [(v, places[j]) for j, v in zip(at.tolist(), values, strict=True) if j in places]
            assert kept
            assert all(torch.equal(now, then) for now, then in kept)


def test_a_question_after_encoded_entries_keeps_its_values() -> None:
    """Its few entries would be bent to make up for all that the second turn drops; those of a long turn are not few."""
    ids = tiny_ids(1, 4 * TOKENS)
    model = compiled(stack(after={"int8": {"residual": 0}}, most=1.0), kernels="sdpa")
    cache = prefilled(model, ids[:, :TOKENS])
    first = cache.read_again
    prefilled(model, ids[:, TOKENS : TOKENS + 12], cache=cache)
    assert cache.read_again == first > 0
    prefilled(model, ids[:, TOKENS + 12 :], cache=cache)
    assert cache.read_again > first + 3 * TOKENS - 12


def test_what_is_left_is_taken_as_it_will_be_stored() -> None:
    """A fit to exact keys leans on weights that few bits do not reproduce: it loses more, one to the codes less."""
    random, n, m = torch.Generator().manual_seed(0), 80, 24
    queries, keys, values = (torch.randn(1, k, 16, generator=random) for k in (60, n, n))
    seen = Observation(
        queries.unsqueeze(0) * 2, torch.full((60,), n), keys, values, torch.arange(n)[None], torch.tensor([n]), n, 0.25
    )
    kept, codec = torch.arange(0, 72, 3), Codec("int2", "token", 16)
    lost = []
    for storage in (PLAIN, Storage(key=codec, value=codec)):
        fit = Fit(torch.arange(m), torch.zeros(m, m), torch.zeros(m, 16))
        _count(fit, seen, kept, n, storage)
        stored = decode(*encode(keys[0, kept], codec), codec, torch.float32)
        weights = torch.softmax(queries[0] * 2 @ stored.T * 0.25, -1)
        wanted = torch.softmax(queries[0] * 2 @ keys[0].T * 0.25, -1) @ values[0]
        lost.append(float((weights @ (values[0, kept] + fit.change(1e-3)) - wanted).square().mean()))
        before = float((weights @ values[0, kept] - wanted).square().mean())
    assert lost[1] < 0.7 * lost[0] < 0.7 * before


def test_heads_that_keep_much_stay_as_they_are() -> None:
    ids = tiny_ids(1, TOKENS)
    cache = prefilled(compiled(stack(most=0.3), kernels="sdpa"), ids)
    plain = prefilled(compiled(ADAPTIVE, kernels="sdpa"), ids)
    for layer, reference in zip(cache.layers, plain.layers, strict=True):
        for (_, values, at), (_, old, _) in zip(layer.held.rows(), reference.held.rows(), strict=True):
            assert torch.equal(values, old) == (len(at) > 0.3 * TOKENS)


def test_a_text_within_the_budget_is_read_again_once_it_is_not() -> None:
    ids, model = tiny_ids(1, TOKENS), compiled(stack(), kernels="sdpa")
    cache = prefilled(model, ids[:, :18])
    assert cache.read_again == 0
    prefilled(model, ids[:, 18:], cache=cache)
    assert cache.read_again == sum(len(again) for _, _, again in replays(ids[0].tolist()))
