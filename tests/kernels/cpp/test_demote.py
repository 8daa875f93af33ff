"""The C++ demoter changes tiers to the very bits that the reference does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import demote as reference
from kvcompile.kernels.codecs import encode
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import demote as generated
from kvcompile.kernels.cpp import encode as encoding
from kvcompile.kernels.demote import NEVER, Demoted, Demoter, NewTokens, Outcome, Rule, TierRows
from kvcompile.kernels.dispatch import CPP
from kvcompile.kernels.layout import RaggedView
from kvcompile.plan.storage import Codec

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
ROOM, TOKENS, RECENT, SINKS = 3, 200, 8, 2
K8, K4, K2 = (Codec(f"int{bits}", "token") for bits in (8, 4, 2))


def tier(lengths: list[int], formats: tuple[Codec, Codec], dims: tuple[int, int], dtype: torch.dtype) -> TierRows:
    """Random entries, of which some have received the same."""
    rooms = [n + ROOM for n in lengths]
    starts = [sum(rooms[:r]) for r in range(len(rooms))]
    sides = [encode(torch.randn(sum(rooms), dim).to(dtype), codec) for codec, dim in zip(formats, dims, strict=True)]
    (keys, key_scales), (values, value_scales) = sides
    positions = torch.randint(TOKENS - 1, (sum(rooms),), dtype=torch.int32)
    begins, counts = torch.tensor(starts), torch.tensor(lengths)
    received = (torch.randint(1, 12, (len(lengths), max(rooms))) / 16).float()
    received[torch.arange(max(rooms)) >= counts.unsqueeze(1)] = NEVER
    since = torch.randint(TOKENS - 1, received.shape).float()
    rows = starts, lengths, 1, len(lengths), begins, begins + counts
    view = RaggedView(keys, values, positions, *rows, key_scales, value_scales)
    return TierRows(view, *formats, received, since)


def case(
    dims: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32,
    lows: tuple[int, ...] = (30, 0, 17, 1, 40, 9),
    highs: tuple[int, ...] = (33, 70, 16, 2, 9, 25),
    came: tuple[int, ...] = (0, 1, 2, 4, 5),
    tokens: float = TOKENS,
) -> tuple[TierRows, TierRows, NewTokens, Tensor, Rule]:
    """Rows of several lengths, one without a new token."""
    low, high = (tier(list(n), *f, dims, dtype) for n, f in ((lows, ((K4, K2),)), (highs, ((K8, K4),))))
    keys, values = (torch.randn(len(came), dim).to(dtype) for dim in dims)
    new = NewTokens(keys, values, torch.full((len(came),), TOKENS - 1, dtype=torch.int32), list(came))
    longest = max(a + b + (r in came) for r, (a, b) in enumerate(zip(lows, highs, strict=True)))
    sums = torch.rand(len(lows), longest + 5)[:, :longest]
    seen = torch.full((len(lows),), tokens, dtype=torch.float32)
    return low, high, new, sums, Rule(seen, 0.6 / seen, 0.3 / seen, RECENT, SINKS, 3)


def copied(tier: TierRows) -> TierRows:
    c = tier.codes
    arrays = {name: getattr(c, name).clone() for name in ("keys", "values", "positions", "key_scales", "value_scales")}
    return replace(tier, codes=replace(c, **arrays), received=tier.received.clone(), since=tier.since.clone())


def state(tier: TierRows) -> list[Tensor]:
    """All that a demoter may change, of the entries there are and the place behind them."""
    c, out = tier.codes, []
    for r, (start, n) in enumerate(zip(c.starts, c.lengths, strict=True)):
        arrays = (c.keys, c.values, c.positions, c.key_scales, c.value_scales)
        out += [x[start : start + n + ROOM] for x in arrays if x is not None]
        out += [tier.received[r, : n + 1], tier.since[r, : n + 1]]
    return out


def check(case: tuple[TierRows, TierRows, NewTokens, Tensor, Rule], demote: Demoter = generated.demote) -> Demoted:
    low, high, *rest = case
    ours, theirs = (copied(low), copied(high)), (copied(low), copied(high))
    got, expected = demote(*ours, *rest), reference.demote(*theirs, *rest)
    assert got == expected
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(64, 64), (16, 16), (128, 128), (80, 40)])
def test_the_same_bits(dims: tuple[int, int], dtype: torch.dtype) -> None:
    seen = set()
    for seed in range(25):
        torch.manual_seed(seed)
        seen.update(check(case(dims, dtype)).outcomes)
    assert seen == set(Outcome), "every outcome is met"


def test_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for seed in range(5):
        torch.manual_seed(seed)
        check(case())


def test_no_token_comes() -> None:
    """What is there is counted all the same."""
    torch.manual_seed(0)
    assert check(case(came=())) == Demoted([Outcome.NOTHING] * 6, ())


def test_everything_is_new_or_a_sink() -> None:
    torch.manual_seed(0)
    assert Outcome.GROWS in check(case(tokens=SINKS)).outcomes


def test_scales_that_float16_does_not_hold_are_told() -> None:
    torch.manual_seed(0)
    low, high, new, sums, rule = case()
    new.keys[2] *= 1e9
    for demote in (generated.demote, reference.demote):
        keys, values = demote(copied(low), copied(high), new, sums, rule).scales
        assert keys == float("inf") > values > 0


def test_other_formats_go_to_the_reference() -> None:
    torch.manual_seed(0)
    low, high, new, sums, rule = case(dims=(64, 64))
    grouped = Codec("int8", "token", 32)
    keys, scales = encode(torch.randn(high.codes.positions.numel(), 64), grouped)
    check((low, replace(high, codes=replace(high.codes, keys=keys, key_scales=scales), key=grouped), new, sums, rule))


@pytest.mark.parametrize("name", ["received", "since"])
def test_what_is_no_memory_of_a_tier_is_refused(name: str) -> None:
    """Another dtype, other strides, another size."""
    low, high, new, sums, rule = case()
    for wrong in (getattr(low, name).double(), getattr(low, name)[:, ::2], getattr(low, name)[:-1]):
        with pytest.raises(KvcompileError, match=name):
            generated.demote(replace(low, **{name: wrong}), high, new, sums, rule)
    with pytest.raises(KvcompileError, match="sums"):
        generated.demote(low, high, new, sums[:, :-1], rule)
    for name, x in (("values", new.values[:2]), ("values", new.values.double()), ("positions", new.positions.long())):
        with pytest.raises(KvcompileError, match=f"new {name}"):
            generated.demote(low, high, replace(new, **{name: x}), sums, rule)


def test_the_backend_has_it() -> None:
    assert CPP.demote is generated.demote
    assert CPP.encode is encoding.encode
