"""Allocations spend the budget to the token, inside their bounds, and fall back to uniform where they should."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract_table import SNAPKV, compiled
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_ids
from torch._subclasses import FakeTensorMode

from kvcompile.evaluation.proof import prove
from kvcompile.exporters.static.selection import BatchScores, allotted
from kvcompile.plan.selection import Allocation, Demand, LayerScores, Uniform
from kvcompile.policies.adakv import AdaptiveHeads, hits
from kvcompile.policies.allocation import largest_remainder, water_fill
from kvcompile.policies.pyramidkv import Pyramid
from kvcompile.policies.zigzag import Uncertainty, minimal_budget

INF = float("inf")
sizes = st.integers(1, 60)


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, ...]:
    n = draw(st.integers(1, 8))
    each = lambda values: torch.tensor(draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    high = each(st.integers(0, 50))
    low = (high * each(st.floats(0, 1))).long()
    base = each(st.floats(0, 40, allow_subnormal=False)).double()
    return base, each(st.floats(0.01, 50)).double(), low, high


@given(rows(), st.integers(0, 300))
def test_water_fill_spends_the_total_within_the_bounds(given_rows: tuple[torch.Tensor, ...], total: int) -> None:
    base, weights, low, high = given_rows
    filled = water_fill(base, weights, low, high, torch.tensor([total]))
    assert int(filled.sum()) == max(int(low.sum()), min(total, int(high.sum())))
    assert (filled >= low).all()
    assert (filled <= high).all()


def test_water_fill_gives_what_a_bound_cuts_to_the_others_by_weight() -> None:
    filled = water_fill(
        torch.zeros(3).double(),
        torch.tensor([6.0, 1.0, 2.0]).double(),
        torch.tensor([0, 0, 0]),
        torch.tensor([30, 90, 90]),
        torch.tensor([90]),
    )
    assert filled.tolist() == [30, 20, 40]  # by weight alone: 60, 10, 20


def test_largest_remainder_keeps_order_and_sum() -> None:
    assert largest_remainder([2.5, 2.3, 1.2], 6) == [3, 2, 1]
    assert largest_remainder([1.5, 1.5], 3) == [2, 1]


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 400), st.integers(0, 40), st.floats(1, 50))
def test_pyramid_conserves_the_total(layers: int, budget: int, tokens: int, floor: int, beta: float) -> None:
    budget, floor = min(budget, tokens), min(floor, tokens)
    budget = max(budget, floor)
    split = Pyramid(beta).split(layers, budget, tokens, floor)
    assert sum(split) == layers * budget
    assert all(floor <= kept <= tokens for kept in split)
    assert split == sorted(split, reverse=True)


def test_pyramid_is_the_line_of_the_paper() -> None:
    # b = 100, k_last = 100 / 20, k_first = 200 - 5; the window of 8 comes on top
    assert Pyramid(20).split(20, 108, 5000, 8) == [195 + 8 - 10 * place for place in range(20)]
    assert Pyramid(20).static(19, 20, 3, 108, 5000, 8) == (13, 13, 13)


def test_pyramid_guards() -> None:
    split = Pyramid(20).split(5, 60, 110, 10)  # k_first = 97.5 would be 100 = tokens - floor at most
    assert split == largest_remainder([97.5 - 23.75 * place + 10 for place in range(5)], 300)
    assert Pyramid(20).split(3, 58, 100, 8) == [100, 58, 16]  # capped: k_first = 92, k_last = 8
    assert Pyramid(20).split(5, 90, 100, 10) == [90] * 5  # tokens < 2 b
    assert Pyramid(20).split(5, 300, 100, 10) == [100] * 5  # everything fits
    assert Pyramid(20).split(1, 50, 1000, 10) == [50]


def scores_of(lengths: list[int], floor: int, seed: int, ties: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(lengths), max(lengths), generator=generator)
    scores = (scores * 3).round() if ties else scores
    for h, length in enumerate(lengths):
        scores[h, max(0, length - floor) : length] = INF
        scores[h, length:] = -INF
    return scores


layer_shapes = st.tuples(
    st.lists(st.integers(1, 60), min_size=1, max_size=5), sizes, st.integers(0, 8), st.integers(0, 99), st.booleans()
)


@given(layer_shapes, st.floats(0, 1))
def test_adakv_conserves_the_total(shape: tuple[list[int], int, int, int, bool], safeguard: float) -> None:
    lengths, budget, floor, seed, ties = shape
    held, budget = torch.tensor(lengths), max(budget, floor)
    look = LayerScores(scores_of(lengths, floor, seed, ties), None, held, budget, floor)
    kept = AdaptiveHeads(safeguard).allot([look])[0]
    assert int(kept.sum()) == min(budget * len(lengths), sum(lengths))
    assert (kept >= held.clamp(max=floor)).all()
    assert (kept <= held).all()


def test_adakv_splits_by_the_common_top() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4], [3, 2, 1, 0, 0, 0]])
    look = LayerScores(scores, None, torch.tensor([6, 6]), 3, 0)
    assert AdaptiveHeads(0.0).allot([look])[0].tolist() == [6, 0]
    assert AdaptiveHeads(0.2).allot([look])[0].tolist() == [5, 1]  # round(0.8 * 6 + 0.2 * 3) = round(5.4)
    assert AdaptiveHeads(1.0).allot([look])[0].tolist() == [3, 3]


def test_adakv_shares_ties_evenly() -> None:
    assert hits(torch.ones(3, 10), torch.tensor([15])).tolist() == [5, 5, 5]
    look = LayerScores(torch.ones(3, 10), None, torch.tensor([10] * 3), 5, 0)
    assert AdaptiveHeads(0.2).allot([look])[0].tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    "how", [AdaptiveHeads(0.2), *(Uncertainty(0.9, 0.2, per, 0.5) for per in ("layer", "head", "adaptive"))], ids=str
)
def test_a_split_reads_no_number_back_in_a_trace(how: Allocation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        one = torch.ones(1, dtype=torch.int64)
        layers = [LayerScores(torch.rand(3, 9), torch.rand(3, 9), (9 * one).expand(3), 4 * one, one) for _ in range(2)]
        kept = how.allot(layers)
    assert [k.shape for k in kept] == [(3,)] * 2
    assert how.traits.traceable


@given(layer_shapes)
def test_the_top_of_all_heads_is_the_same_in_a_trace(shape: tuple[list[int], int, int, int, bool]) -> None:
    lengths, places, *rest = shape
    scores = scores_of(lengths, *rest)
    given_places = torch.tensor([min(places, sum(lengths))])
    expected = hits(scores, given_places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(hits(scores, given_places), expected)


def test_a_head_may_get_nothing() -> None:
    """Where neither a floor nor protected tokens keep a layer's share above it."""
    masses = [torch.stack([diffuse(60, 60)] * 2), torch.stack([diffuse(60, 1)] * 2)]
    kept = Uncertainty(0.9, 0.0, "adaptive", 1.0).allot(looks(masses, 1, 0))
    assert [k.tolist() for k in kept] == [[2, 2], [0, 0]]


@pytest.mark.parametrize("n", [1, 7, 10, 33, 100, 1000])
def test_minimal_budget_of_uniform_and_of_one_hot_attention(n: int) -> None:
    uniform = torch.zeros(2, n).softmax(-1)
    assert minimal_budget(uniform, 0.9).tolist() == [math.ceil(0.9 * n)] * 2
    assert minimal_budget(torch.eye(n)[:2], 0.9).tolist() == [1] * min(n, 2)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=30), st.floats(0.1, 0.95))
def test_minimal_budget_is_the_smallest_set_that_holds_the_share(mass: list[float], share: float) -> None:
    ranked = sorted(mass, reverse=True)
    need = int(minimal_budget(torch.tensor([mass], dtype=torch.float64), share)[0])
    assert sum(ranked[:need]) >= (share - 2e-6) * sum(mass)
    assert sum(ranked[: need - 1]) < share * sum(mass)


def looks(masses: list[torch.Tensor], budget: int, floor: int) -> list[LayerScores]:
    return [
        LayerScores(m, m, torch.full((m.shape[0],), m.shape[1]), min(budget, m.shape[1]), min(floor, m.shape[1]))
        for m in masses
    ]


def diffuse(n: int, need: int) -> torch.Tensor:
    """A row whose attention lies evenly on `need` of its `n` entries: MBA = ceil(0.9 need)."""
    return torch.cat((torch.ones(need), torch.zeros(n - need))) / need


@pytest.mark.parametrize("per", ["layer", "head"])
@given(
    needs=st.lists(st.integers(1, 60), min_size=2, max_size=12),
    budget=sizes,
    bounds=st.tuples(st.integers(0, 8), st.floats(0, 1), st.floats(0.01, 1)),
)
@settings(max_examples=60)
def test_zigzag_conserves_the_total(per: str, needs: list[int], budget: int, bounds: tuple[int, float, float]) -> None:
    always, floor, cap = bounds
    budget = max(budget, always)
    masses = [torch.stack((diffuse(60, a), diffuse(60, b))) for a, b in zip(needs, reversed(needs), strict=True)]
    kept = Uncertainty(0.9, floor, per, cap).allot(looks(masses, budget, always))
    assert sum(int(k.sum()) for k in kept) == budget * 2 * len(needs)
    assert all((k >= always).all() and (k <= 60).all() for k in kept)
    highest = max(budget, int(cap * budget * len(needs) * (2 if per == "head" else 1)), always)
    assert all((k <= highest).all() for k in kept)


def test_zigzag_spends_all_of_layers_shorter_than_the_budget() -> None:
    masses = [torch.stack([diffuse(n, n // 2)] * 3) for n in (10, 60, 90)]
    kept = Uncertainty(0.9, 0.2, "layer", 1.0).allot(looks(masses, 40, 4))
    assert sum(int(k[0]) for k in kept) == 10 + 40 + 40
    assert int(kept[0][0]) <= 10


@pytest.mark.parametrize("cap", [1.0, 0.2])
def test_zigzag_gives_what_rows_no_longer_hold_to_the_others(cap: float) -> None:
    masses = [torch.stack([diffuse(60, 60)] * 2)] * 4
    held = [torch.tensor([9, 60]), torch.tensor([60, 12]), torch.tensor([60, 60]), torch.tensor([5, 5])]
    after = [LayerScores(m, m, n, 24, 4) for m, n in zip(masses, held, strict=True)]
    kept = Uncertainty(0.9, 0.2, "head", cap).allot(after)
    assert sum(int(k.sum()) for k in kept) == 24 * 8
    assert all((k <= n).all() for k, n in zip(kept, held, strict=True))


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("budget", [7, 33, 199])
def test_zigzag_of_equal_layers_is_uniform(per: str, budget: int) -> None:
    masses = [torch.stack([diffuse(211, 70)] * 3)] * 13
    kept = Uncertainty(0.9, 0.2, per, 1.0).allot(looks(masses, budget, 4))  # type: ignore[arg-type]
    assert all(tuple(k.tolist()) == Uniform().static(0, 13, 3, budget, 211, 4) for k in kept)


def test_zigzag_is_the_formula() -> None:
    masses = [torch.stack([diffuse(1000, need)] * 2) for need in (10, 20, 50)]  # LMBA 9, 18, 45
    kept = Uncertainty(0.9, 0.1, "layer", 1.0).allot(looks(masses, 100, 4))
    # B_min = 10, (B - B_min) L = 270, shares 1/8, 1/4, 5/8
    assert [k.tolist() for k in kept] == [[44, 44], [77, 77], [179, 179]]  # 43.75, 77.5, 178.75


def test_zigzag_averages_over_the_heads_of_a_layer_or_keeps_them_apart() -> None:
    masses = [torch.stack((diffuse(1000, 10), diffuse(1000, 70))), torch.stack([diffuse(1000, 40)] * 2)]
    by_layer = Uncertainty(0.9, 0.0, "layer", 1.0).allot(looks(masses, 100, 4))
    by_head = Uncertainty(0.9, 0.0, "head", 1.0).allot(looks(masses, 100, 4))
    assert [k.tolist() for k in by_layer] == [[100, 100], [100, 100]]
    assert [k.tolist() for k in by_head] == [[25, 175], [100, 100]]


def test_zigzag_cap_limits_the_largest_layer() -> None:
    masses = [torch.stack([diffuse(1000, need)] * 2) for need in (900, 10, 10, 10)]
    kept = Uncertainty(0.9, 0.2, "layer", 0.4).allot(looks(masses, 100, 4))
    assert [int(k[0]) for k in kept] == [160, 80, 80, 80]


@st.composite
def layers_of_a_prompt(draw: st.DrawFn) -> tuple[list[LayerScores], Uncertainty]:
    """What `compress` hands to a cross-layer allocation, and one; some layers may hold no more than their budget."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    heads, n, always = draw(st.integers(1, 4)), draw(st.integers(2, 60)), draw(st.integers(0, 6))
    made = []
    for _ in range(draw(st.integers(1, 6))):
        held = draw(st.sampled_from((n, max(1, n // 2))))  # of layers that slide
        floor = min(held, always)
        budget = max(min(draw(st.integers(1, 60)), held), floor)
        scores = torch.rand(heads, n, generator=random)
        scores[:, : n - held], scores[:, n - floor :] = -INF, INF
        mass = (torch.rand(heads, n, generator=random) * draw(st.integers(1, 30))).softmax(-1)
        made.append(LayerScores(scores, mass, torch.full((heads,), held), budget, floor))
    per = draw(st.sampled_from(("layer", "head", "adaptive")))
    return made, Uncertainty(0.9, draw(st.floats(0, 1)), per, draw(st.floats(0.01, 1)), draw(st.floats(0, 1)))


@given(layers_of_a_prompt())
@settings(max_examples=300)
def test_zigzag_in_a_program_is_zigzag(drawn: tuple[list[LayerScores], Uncertainty]) -> None:
    """Layers that keep everything take no part, and nobody gets more than the room that is made for it."""
    layers, how = drawn
    short = [x for x in layers if x.budget < int(x.lengths[0])]  # the others keep everything: `compress` never asks
    asked = iter(how.allot(short)) if short else iter(())
    expected = [next(asked) if any(x is y for y in short) else x.lengths for x in layers]
    seen = {
        i: BatchScores(x.scores[None], x.lengths[None], mass=None if x.mass is None else x.mass[None])
        for i, x in enumerate(layers)
    }
    budgets = {i: (torch.tensor([x.budget]), torch.tensor([x.floor])) for i, x in enumerate(layers)}
    got = [k[0] for k in allotted(how, budgets, seen).values()]
    assert [k.tolist() for k in got] == [k.tolist() for k in expected]
    most = how.most([Demand(len(x.lengths), int(x.budget), int(x.floor), int(x.lengths[0])) for x in layers])
    spent = [k.double().mean() if how.traits.competing else k.max() for k in got]
    assert all(k <= limit for k, limit in zip(spent, most, strict=True))


CHUNKED = {
    "uniform": {"knorm": {}},
    "pyramidkv": {"pyramidkv": {}},
    "pyramidkv, steeper": {"snapkv": SNAPKV, "pyramidkv": {"beta": 2.0}},
    "adakv": {"adakv": {}},
    "zigzag": {"zigzag": {}},
    "retrieval_heads": {"retrieval_heads": {"heads": [[0, 1], [2, 0]], "recent": 4}},
}


@pytest.mark.parametrize("stack", CHUNKED.values(), ids=CHUNKED)
@example(0.6, 3, 60, "llama")  # steeper than one token a token
@example(40, 3, 60, "llama")  # uniform at first, a pyramid at the end
@example(0.6, 128, 200, "llama")  # a pyramid at first, uniform at the end
@given(
    st.sampled_from([0.3, 0.52, 0.9, 24, 40, 60, 100]),
    st.sampled_from([5, 16, 40, 128]),
    st.integers(20, 230),
    st.sampled_from(["llama", "gemma2"]),
)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
def test_a_prompt_in_chunks_ends_in_the_planned_tokens(
    stack: dict[str, dict[str, Any]], budget: float, chunk: int, tokens: int, architecture: str
) -> None:
    """What an early chunk evicts must not be what the split of the whole prompt keeps."""
    fields = {name: {**own, "budget": budget} if name == list(stack)[-1] else own for name, own in stack.items()}
    rows, _ = prove(compiled(fields, architecture, kernels="sdpa", prefill_chunk=chunk), tiny_ids(1, tokens))
    assert all(row.planned in (None, row.kept) for row in rows)
