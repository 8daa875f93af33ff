"""Two tiers at work: what each decoded token does, token by token as the paper says it, and what never changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from contract_table import HEADS, LAYERS, Options, compiled, kept_positions, off
from tiny import tiny_ids
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.demote import Demoted, Demoter, Outcome, Rule, demoted
from kvcompile.runtime import eviction
from kvcompile.stores.encoded.codes import Codes
from kvcompile.stores.encoded.tiered import HIGH, LOW, TieredStore
from kvcompile.stores.factory import low as low_of

RECENT, PROMPT = 8, 90
LEANKV: Options = {"leankv": {"alpha_high": 1.1, "alpha_low": 0.6, "recent": RECENT, "sinks": 2}}


def tiers(layer: Any) -> list[tuple[set[int], set[int]]]:
    """True positions in the low and in the high tier of each row."""
    store = layer.held
    return [tuple(set(t.positions(r).tolist()) for t in store.tiers) for r in range(len(store.lengths))]


class Literal:
    """One row as the paper has it: entries by position, one token after the other, no tensors."""

    def __init__(self, low: dict[int, list[Any]], high: dict[int, list[Any]], options: dict[str, Any]) -> None:
        self.low, self.high, self.options = low, high, options  # position -> [sum of attention, first query counted]

    def token(self, tokens: int, attention: dict[int, np.float32]) -> None:
        """The last of so many tokens has come, and its query has paid this attention."""
        above, below = (np.float32(self.options[name]) / np.float32(tokens) for name in ("alpha_high", "alpha_low"))
        for tier in (self.low, self.high):
            for position, entry in tier.items():
                entry[0] = np.float32(entry[0] + attention[position])
        new = [attention[tokens - 1], tokens - 1]

        def mean(entry: list[Any]) -> np.float32:
            return entry[0] / np.float32(tokens - entry[1])

        may_leave = [p for p in self.high if self.options["sinks"] <= p < tokens - self.options["recent"]]
        u = min(may_leave, key=lambda p: mean(self.high[p]), default=None)
        v = min(self.low, key=lambda p: mean(self.low[p]), default=None)
        if u is not None:
            weak_low = np.float32("inf") if v is None else mean(self.low[v])
            weak = mean(self.high[u])
            if weak < below and weak < weak_low:
                del self.high[u]
            elif weak < above and weak_low < below:
                del self.low[v]
                self.low[u] = self.high.pop(u)
            elif weak < above:
                self.low[u] = self.high.pop(u)
        self.high[tokens - 1] = new


def literal(layer: Any, row: int) -> Literal:
    """What a row holds now, as the literal rule keeps it."""
    by_tier = []
    for tier in layer.held.tiers:
        entries = zip(
            tier.positions(row).tolist(), tier.received[row].numpy(), tier.since[row].long().tolist(), strict=False
        )
        by_tier.append({p: [sums, since] for p, sums, since in entries})
    return Literal(*by_tier, LEANKV["leankv"])


def paid(layer: Any, row: int) -> dict[int, np.float32]:
    """The attention that the kernel of this step has added up for the entries of a row, by position."""
    store = layer.held
    positions = torch.cat([*(tier.positions(row) for tier in store.tiers), store.residual.rows()[row][2]])
    sums = layer.history.column_sums.flatten(0, 1)[row] / 2  # the group
    return dict(zip(positions.tolist(), sums.numpy(), strict=False))


def test_two_hundred_tokens_as_the_paper_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them drops, replaces, lowers or appends exactly what a loop over entries does."""
    ids, model, rows = tiny_ids(2, PROMPT + 200), compiled(LEANKV), {}
    outcomes: Counter[int] = Counter()
    inner_demote, inner_store = eviction.demote, TieredStore.demote

    def demote(layer: Any, step: Any) -> None:
        if not step.prefill:
            for r in range(2 * HEADS):
                rows[layer.plan.index, r].token(step.cache.seen[r // HEADS], paid(layer, r))
        inner_demote(layer, step)

    def counted(store: TieredStore, sums: Tensor, rule: Rule, headroom: int, compactor: Any, demoter: Demoter) -> int:
        def noting(*given: Any) -> Demoted:
            demoted = demoter(*given)
            outcomes.update(demoted.outcomes)
            return demoted

        return inner_store(store, sums, rule, headroom, compactor, noting)

    monkeypatch.setattr(eviction, "demote", demote)
    monkeypatch.setattr(TieredStore, "demote", counted)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values
        rows.update({(i, r): literal(cache.layers[i], r) for i in range(LAYERS) for r in range(2 * HEADS)})
        for t in range(PROMPT, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
            for i, layer in enumerate(cache.layers):
                for r, (low, high) in enumerate(tiers(layer)):
                    assert (low, high) == (set(rows[i, r].low), set(rows[i, r].high)), (t, i, r)
    assert all(outcomes[o] > 20 for o in (Outcome.DROPS, Outcome.REPLACES, Outcome.LOWERS)), "every case is met"


def test_the_rule_case_by_case() -> None:
    """(1) drop, (2) take the place of a low entry, (3) a new low place, (4) stay; at a threshold nothing happens."""
    u = torch.tensor([0.01, 0.04, 0.02, 0.30, 0.01, 0.10, float("inf")])
    v = torch.tensor([0.03, 0.02, float("inf"), 0.01, 0.01, 0.05, 0.01])
    below, prune = torch.full_like(u, 0.1), torch.full_like(u, 0.03)
    drops, replaces, lowers = demoted(u, v, below, prune)
    assert drops.tolist() == [True, False, True, False, False, False, False]
    assert replaces.tolist() == [False, True, False, False, True, False, False]
    assert lowers.tolist() == [False, False, False, False, False, False, False]
    assert demoted(u, v.fill_(0.05), below, prune)[2].tolist() == [False, True, False, False, False, False, False]


def test_without_thresholds_everything_stays_high() -> None:
    ids = tiny_ids(2, PROMPT + 40)
    model = compiled({"leankv": {"alpha_high": 0.0, "alpha_low": 0.0}})
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values
        for t in range(PROMPT, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert all(low_of(layer.held) == [0] * 2 * HEADS for layer in cache.layers)
    assert kept_positions(cache) == [[list(range(PROMPT + 40))] * 2 * HEADS] * LAYERS


def test_what_is_lowered_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A low entry that was high before is the codec of the low tier over what the high codes decode to."""
    ids, model = tiny_ids(1, PROMPT + 40), compiled(LEANKV)
    with torch.no_grad():
        cache = model(ids[:, :PROMPT]).past_key_values
        layer, high_codes, checked = cache.layers[1], {}, 0
        for t in range(PROMPT, ids.shape[1]):
            store = layer.held
            for r in range(HEADS):
                tier = store.tiers[HIGH]
                codes = tier.picked(
                    [torch.arange(n) if i == r else torch.arange(0) for i, n in enumerate(tier.lengths)]
                )
                high_codes.update(
                    {(r, int(p)): codes[0].span(j, j + 1, tier.format) for j, p in enumerate(codes[0].positions)}
                )
            before = tiers(layer)
            model(ids[:, t : t + 1], past_key_values=cache)
            for r, (old, new) in enumerate(zip(before, tiers(layer), strict=True)):
                for position in new[0] - old[0]:
                    expected = Codes.of(*high_codes[r, position].decoded(store.formats[HIGH]), store.formats[LOW])
                    place = layer.held.tiers[LOW].positions(r).tolist().index(position)
                    low = layer.held.tiers[LOW]
                    at = low.starts[r] + place
                    got = low.codes.span(at, at + 1, low.format)
                    assert all(torch.equal(a, b) for a, b in zip(got.tensors, expected.tensors, strict=True))
                    checked += 1
    assert checked > 10


def run(model: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits of each decoded token, and the cache; positions are those without padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids[:, :prompt], mask[:, :prompt], at[:, :prompt])
        logits = []
        for t in range(prompt, ids.shape[1]):
            new = slice(t, t + 1)
            out = model(ids[:, new], mask[:, : t + 1], at[:, new], past_key_values=out.past_key_values)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), out.past_key_values


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_padded_batch_is_what_its_sequences_are_alone(chunk: int) -> None:
    ids, pads = tiny_ids(3, PROMPT + 25), (0, 13, 70)
    mask = torch.ones_like(ids)
    for b, n in enumerate(pads):
        mask[b, :n] = 0
    model = compiled(LEANKV, prefill_chunk=chunk)
    logits, cache = run(model, ids, PROMPT, mask)
    for b, n in enumerate(pads):
        alone, single = run(model, ids[b : b + 1, n:], PROMPT - n)
        assert off(logits[b], alone[0]) < 5e-3  # another order of sums now and then makes another code
        for together, other in zip(cache.layers, single.layers, strict=True):
            assert tiers(together)[b * HEADS : (b + 1) * HEADS] == tiers(other)


def test_a_sequence_that_gets_no_token_stays_as_it_is() -> None:
    """A step in which one sequence of two has padding alone."""
    ids, model = tiny_ids(2, PROMPT + 12), compiled(LEANKV)
    mask = torch.ones_like(ids)
    mask[1, PROMPT + 3 : PROMPT + 7] = 0
    logits, cache = run(model, ids, PROMPT, mask)
    alone, single = run(model, ids[1:, mask[1].bool()], PROMPT)
    assert off(logits[1, -5:], alone[0, -5:]) < 1e-4
    for together, other in zip(cache.layers, single.layers, strict=True):
        assert tiers(together)[HEADS:] == tiers(other)


def test_forks_and_selected_sequences_go_on_as_they_would_have() -> None:
    ids, model = tiny_ids(2, PROMPT + 40), compiled(LEANKV)
    _, cache = run(model, ids[:, : PROMPT + 20], PROMPT)
    other, swapped = cache.fork(), cache.fork()
    swapped.batch_select_indices(torch.tensor([1, 0, 1]))
    with torch.no_grad():
        for t in range(PROMPT + 20, PROMPT + 40):
            expected = model(ids[:, t : t + 1], past_key_values=cache).logits
            mixed = model(ids[[1, 0, 1], t : t + 1], past_key_values=swapped).logits
        for t in range(PROMPT + 20, PROMPT + 40):
            again = model(ids[:, t : t + 1], past_key_values=other).logits
    assert torch.equal(again, expected)
    torch.testing.assert_close(mixed, expected[[1, 0, 1]], atol=1e-3, rtol=1e-3)
    for layer, fork, moved in zip(cache.layers, other.layers, swapped.layers, strict=True):
        assert tiers(layer) == tiers(fork)
        assert tiers(moved) == [tiers(layer)[r] for r in (2, 3, 0, 1, 2, 3)]


def test_a_fork_goes_its_own_way() -> None:
    """What the one demotes, drops and overwrites stays where it is in the other."""
    model, ids = compiled(LEANKV), tiny_ids(1, PROMPT)
    _, cache = run(model, ids, PROMPT - 1)
    branches = (cache, 1), (cache.fork(), 2)
    with torch.no_grad():
        for branch, seed in branches:
            for token in tiny_ids(1, 40, seed).T:
                logits = model(token[None], past_key_values=branch).logits
            expected, alone = run(model, torch.cat((ids, tiny_ids(1, 40, seed)), 1), PROMPT - 1)
            torch.testing.assert_close(logits[:, -1], expected[:, -1])
            assert [tiers(layer) for layer in branch.layers] == [tiers(layer) for layer in alone.layers]


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
def test_beams_of_a_padded_batch_are_those_of_its_sequences(kernels: str) -> None:
    """Beams that are dropped and doubled take their tiers, and what these have received, along."""
    ids, model, pad = tiny_ids(2, PROMPT, seed=3), compiled(LEANKV, kernels=kernels), 17
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    options["return_dict_in_generate"] = True
    together = model.generate(ids, attention_mask=mask, **options)
    for b, n in enumerate((0, pad)):
        alone = model.generate(ids[b : b + 1, n:], attention_mask=mask[b : b + 1, n:], **options)
        assert together.sequences[b, PROMPT:].tolist() == alone.sequences[0, PROMPT - n :].tolist()
        rows = slice(b * 3 * HEADS, (b + 1) * 3 * HEADS)
        for both, one in zip(together.past_key_values.layers, alone.past_key_values.layers, strict=True):
            assert tiers(both)[rows] == tiers(one)
    assert any(low for layer in together.past_key_values.layers for low, _ in tiers(layer))


def test_a_short_turn_counts_on_and_a_long_one_begins_anew() -> None:
    """Three queries alone do not say what may go: what was counted before weighs in."""
    ids, model = tiny_ids(1, 400), compiled(LEANKV)
    _, cache = run(model, ids[:, : PROMPT + 10], PROMPT)
    store = cache.layers[0].held
    before = {
        r: dict(zip(store.tiers[LOW].positions(r).tolist(), store.tiers[LOW].since[r].tolist())) for r in range(HEADS)
    }
    assert {x for row in before.values() for x in row.values()} == {*[float(PROMPT - 64)], *before_since(before)}
    with torch.no_grad():
        model(ids[:, PROMPT + 10 : PROMPT + 13], past_key_values=cache)
        for r in range(HEADS):
            low = cache.layers[0].held.tiers[LOW]
            after = dict(zip(low.positions(r).tolist(), low.since[r].tolist()))
            assert {p: after[p] for p in before[r] if p in after} == {p: s for p, s in before[r].items() if p in after}
        model(ids[:, PROMPT + 13 : PROMPT + 113], past_key_values=cache)
    for r in range(HEADS):
        low = cache.layers[0].held.tiers[LOW]
        assert all(s >= PROMPT + 113 - 64 for s in low.since[r, : low.lengths[r]].tolist())


def before_since(before: dict[int, dict[int, float]]) -> set[float]:
    """Entries inside the window of the prompt's last queries count from their own on."""
    return {s for row in before.values() for p, s in row.items() if p > PROMPT - 64}


def test_every_byte_is_counted() -> None:
    """Codes and scales are what the plan says; positions and what entries received come on top, by the entry."""
    model = compiled(LEANKV)
    _, cache = run(model, tiny_ids(1, PROMPT + 30), PROMPT)
    for layer in cache.layers:
        store, held = layer.held, sum(layer.held.lengths)
        # K8V4 of 16 channels: 16 + 8 bytes and 4 numbers of 2; K4V2: 8 + 4 and the same
        assert store.nbytes() == sum(
            (n - low) * 32 + low * 20 for n, low in zip(store.lengths, low_of(layer.held), strict=True)
        )
        alive = sum(x.untyped_storage().nbytes() for x in store.tensors())
        assert alive == store.allocated() >= store.nbytes() + held * (4 + 8)


def test_decoded_tokens_cannot_be_taken_back() -> None:
    _, cache = run(compiled(LEANKV), tiny_ids(1, PROMPT + 3), PROMPT)
    with pytest.raises(KvcompileError, match="encoding"):
        cache.crop(-1)


def test_generated_kernels_agree_with_the_reference() -> None:
    """Two runs of codes and the newest token under one softmax; the same entries go down and out."""
    ids = tiny_ids(1, PROMPT + 12)
    got, cache = run(compiled(LEANKV, kernels="cpp"), ids, PROMPT)
    expected, other = run(compiled(LEANKV, kernels="reference"), ids, PROMPT)
    assert off(got, expected) < 3e-3  # weights of integer codes are rounded to 16 bits, which now and then flips a code
    assert [tiers(layer) for layer in cache.layers] == [tiers(layer) for layer in other.layers]
