"""Ghosts score what a loop in float64 says, in rows that have lost entries; what carries the scores between passes is
`tests/runtime/test_ghosts.py`, the sums themselves are `tests/kernels/test_ghost.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from observation import observation
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.policies.ghost import Ghost, GhostReplay
from kvcompile.runtime.observation import Observation

SCORE = GhostReplay(shift=9, chunk=8, band=2, sinks=4)
DIM = 8


def turn(shift: int) -> Tensor:
    """A rotation of pairs of channels by some angle each."""
    angles = shift * torch.tensor([0.9, 0.4, 0.1, 0.02])
    upper = torch.cat((torch.diag(angles.cos()), torch.diag(angles.sin())), 1)
    lower = torch.cat((-torch.diag(angles.sin()), torch.diag(angles.cos())), 1)
    return torch.cat((upper, lower))


def text(new: int = 11, before: int = 26, lost: tuple[int, ...] = (20, 15), heads: int = 2, **more: Any) -> Observation:
    """`new` tokens with their queries after `before` ones, of which each head has lost some; the sinks are held.

    What lies past a row's end is NaN: nothing of it may be read.
    """
    look = observation(entries=before + new, heads=heads, window=new, dim=DIM, **more)
    source = torch.Generator().manual_seed(1)
    rows = []
    for h in range(heads):
        others = torch.randperm(max(0, before - 4), generator=source)[lost[h % len(lost)] :] + 4
        rows.append(torch.cat((torch.arange(min(4, before)), others.sort().values, torch.arange(before, before + new))))
    positions = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    shape = *positions.shape, DIM
    keys, values = (torch.randn(shape, generator=source) for _ in range(2))
    keys[positions < 0] = values[positions < 0] = float("nan")
    lengths = torch.tensor([len(row) for row in rows])
    return replace(look, keys=keys, values=values, positions=positions, lengths=lengths, rotation=turn)


def slowest(seen: Observation, score: GhostReplay) -> Tensor:
    """The scores of the new entries, one number at a time, `[H_kv, n]`, float64; of the others 0."""
    out = torch.zeros(seen.positions.shape, dtype=torch.float64)
    window, rotation = seen.sliding_window, seen.rotation
    assert rotation is not None
    rotate = rotation(score.shift if window is None else min(score.shift, window // 2)).double()
    length = min(score.chunk or 10**6, window or 10**6)
    new = seen.query_positions.tolist()

    def weight(query: Tensor, key: Tensor) -> float:
        x = float(query @ key) * seen.scale
        return math.exp(x if seen.softcap is None else seen.softcap * math.tanh(x / seen.softcap))

    for h, row in enumerate(seen.positions.tolist()):
        at = {p: j for j, p in enumerate(row) if p >= 0}
        for g in range(seen.queries.shape[1]):
            for i, t in enumerate(new):
                query = seen.queries[h, g, i].double()
                chunk = [p for p in new if p // length == t // length]
                look = {
                    p: weight(query @ rotate, seen.keys[h, at[p]].double())
                    for p in {*range(min(score.sinks, chunk[0])), *chunk}
                }
                own = {p: weight(query, seen.keys[h, at[p]].double()) for p in chunk if score.sinks <= p <= t}
                total = sum(look.values()) + sum(own.values())
                total += 0.0 if seen.sinks is None else math.exp(float(seen.sinks[h, g]))
                output = sum(
                    (w / total * seen.values[h, at[p]].double() for part in (look, own) for p, w in part.items()),
                    torch.zeros(DIM, dtype=torch.float64),
                )
                for p in chunk:
                    if not score.band or abs(t - p) <= score.band:
                        share = look[p] / total
                        change = (seen.values[h, at[p]].double() - output) * share / max(1 - share, 1e-6)
                        out[h, at[p]] += change.square().sum()
    return out


def check(seen: Observation, score: GhostReplay = SCORE) -> Tensor:
    got = score.observe(seen)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), slowest(seen, score), rtol=5e-4, atol=1e-9)
    return got


@pytest.mark.parametrize("chunk", [0, 1, 5, 8, 64])
@pytest.mark.parametrize("band", [0, 1, 3])
@pytest.mark.parametrize(("new", "before"), [(11, 26), (1, 26), (13, 0), (3, 0), (9, 2)])
def test_scores_are_the_formula(chunk: int, band: int, new: int, before: int) -> None:
    """At the beginning of a text, where the sinks are among the new tokens, and further on."""
    check(text(new, before), replace(SCORE, chunk=chunk, band=band))


@pytest.mark.parametrize(
    "more",
    [
        {"heads": 1, "group": 1},
        {"heads": 3, "group": 8},
        {"softcap": 1.5},
        {"sinks": torch.tensor([[0.5, 1.0, -2.0], [3.0, 0.0, 0.1]])},
        {"sliding_window": 6},
        {"lost": (0, 22)},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk", [0, 8])
def test_whatever_the_attention(more: dict[str, Any], chunk: int) -> None:
    """Groups of any size, capped logits, learned sinks, windows, rows of very different lengths."""
    check(text(**more), replace(SCORE, chunk=chunk))


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
def test_sinks_are_there_once(sinks: int) -> None:
    """They weigh in every chunk, but not a second time in the own part of one."""
    score = replace(SCORE, sinks=sinks, chunk=6)
    check(text(14, 0), score)
    if sinks == 4:
        look = text(8, 0)
        look.keys[:, 0] = 2 * look.queries.mean((1, 2))  # everything looks at the first token
        once = check(look, replace(score, chunk=0))
        twice = replace(score, chunk=0, sinks=0).observe(look)  # in a first chunk nothing else hangs on it
        assert (once > 1.05 * twice).any(), "what weighs twice takes from the others"


def test_the_echo_itself_counts() -> None:
    """A ghost votes for its own first copy: without t = j needles were lost in the probes."""
    assert (check(text(new=1))[:, -1:] > 0).any(), "no other ghost could vote for a single token"


def test_all_the_attention_of_a_ghost_is_a_finite_score() -> None:
    look = text(6, group=1)
    new = look.positions >= 26
    look.keys[new] = 0.0
    look.keys[look.positions == 28] = 60.0
    look = replace(look, queries=torch.full_like(look.queries, 9.0), rotation=lambda shift: torch.eye(DIM))
    got = replace(SCORE, chunk=0).observe(look)
    assert got.isfinite().all()
    assert (got[new] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_read_and_float32_is_summed(dtype: torch.dtype) -> None:
    """The square of a small weight is 0 in 16 bits: entries would tie, and the oldest win."""
    look = text(40, group=1)
    look = replace(look, keys=9 * look.keys, rotation=lambda shift: torch.eye(DIM))
    low = replace(look, **{name: getattr(look, name).to(dtype) for name in ("queries", "keys", "values")})
    high = replace(low, **{name: getattr(low, name).float() for name in ("queries", "keys", "values")})
    score = replace(SCORE, chunk=0, band=0)
    got = score.observe(low)
    torch.testing.assert_close(got, score.observe(high))
    new = look.positions >= 26
    assert (got[new] > 0).all()
    assert (got[new].half() == 0).any(), "the case shows nothing"


def test_what_was_carried_stays() -> None:
    look = text()
    carried = torch.rand(look.positions.shape)
    torch.testing.assert_close(SCORE.observe(replace(look, carried=carried)), carried + SCORE.observe(look))
    none = replace(look, queries=look.queries[:, :, :0], query_positions=look.query_positions[:0], carried=carried)
    assert torch.equal(SCORE.observe(none), carried)
    assert torch.equal(SCORE.score(none), carried)


def test_a_sink_that_one_head_has_lost_is_seen_by_none() -> None:
    look = text()
    look.positions[1, 3] = look.positions[1, 4]  # an allocation with fewer sinks of its own
    fewer = replace(look, keys=look.keys.clone())
    fewer.keys[:, 3] = float("nan")
    assert torch.equal(SCORE.observe(fewer), SCORE.observe(replace(look, keys=look.keys)))
    assert SCORE.observe(fewer).isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"shift": -1}, {"chunk": -1}, {"band": -1}, {"recent": -1}, {"budget": 1.5}], ids=str
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KvcompileError, match=f"stack.ghost: {next(iter(wrong))}"):
        Ghost(**wrong)
