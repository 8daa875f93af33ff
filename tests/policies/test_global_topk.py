"""One budget for all layers and heads: the highest scores stay wherever they are, exactly as many as were promised."""

from __future__ import annotations

import pytest
import torch
from contract_table import SNAPKV, compiled, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from selecting import Hashed, hashed, kept, prefill, selection
from selecting import compiled as selected
from tiny import tiny_ids

from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.exporters.static.supports import refuse
from kvcompile.plan.selection import LayerScores
from kvcompile.policies.global_topk import BestOfAll
from kvcompile.report.plan_table import notes
from kvcompile.runtime.selection import highest

INF = float("inf")


@st.composite
def layers(draw: st.DrawFn) -> list[LayerScores]:
    """Layers of different lengths, scores with ties, protected entries at both ends and dead tails."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    heads, floor = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        lengths = torch.tensor([draw(st.integers(5, 40)) for _ in range(heads)])
        scores = torch.randint(0, draw(st.sampled_from((2, 9, 10**6))), (heads, int(lengths.max())), generator=random)
        scores = scores.float()
        for row, n in zip(scores, lengths.tolist(), strict=True):
            row[:floor], row[n:] = INF, -INF
        drawn.append(LayerScores(scores, None, lengths, draw(st.integers(max(1, floor), 40)), floor))
    return drawn


@given(layers())
@settings(max_examples=200, deadline=None)
def test_the_highest_stay_and_the_sum_is_exact(given_layers: list[LayerScores]) -> None:
    counts = BestOfAll().allot(given_layers)
    held = sum(int(x.lengths.sum()) for x in given_layers)
    places = min(held, sum(x.budget * len(x.lengths) for x in given_layers))
    assert sum(int(c.sum()) for c in counts) == places
    taken, left = [], []
    for x, count in zip(given_layers, counts, strict=True):
        assert (count <= x.lengths).all()
        assert count.dtype == torch.int64
        for row, indices in zip(x.scores, highest(x.scores, count), strict=True):
            stays = torch.zeros(len(row), dtype=torch.bool)
            stays[indices] = True
            taken += row[stays].tolist()
            left += row[~stays].tolist()
    every = sorted(taken + left, reverse=True)
    assert sorted(taken, reverse=True) == every[:places]


def test_ties_go_to_what_stands_first_in_its_row() -> None:
    def allotted(first: int, second: int) -> list[list[int]]:
        """Of a layer of two heads and one of a head, all of whose scores are alike."""
        rows = [(torch.ones(2, 5), first), (torch.ones(1, 5), second)]
        alike = [LayerScores(x, None, torch.full((len(x),), 5), budget, 0) for x, budget in rows]
        return [count.tolist() for count in BestOfAll().allot(alike)]

    assert allotted(2, 1) == [[2, 2], [1]]
    assert allotted(3, 2) == [[3, 3], [2]]


def test_scores_are_told_apart_that_sixteen_bits_would_not() -> None:
    """Those of ghosts are squares of small numbers."""
    low = LayerScores(torch.tensor([[1e-12, 3e-12, 2e-12, 4e-12]]), None, torch.tensor([4]), 1, 0)
    high = LayerScores(torch.tensor([[5e-12, 1.0, 1e-30, 1e-29]]), None, torch.tensor([4]), 2, 0)
    assert [c.tolist() for c in BestOfAll().allot([low, high])] == [[1], [2]]


def test_what_always_stays_is_inside_the_budget() -> None:
    scores = torch.rand(2, 20)
    scores[:, :2] = scores[:, 17:] = INF
    poor = LayerScores(scores.clone(), None, torch.tensor([20, 20]), 6, 5)
    poor.scores[:, 2:17] /= 1000
    rich = LayerScores(scores, None, torch.tensor([20, 20]), 6, 5)
    counts = BestOfAll().allot([poor, rich])
    assert counts[0].tolist() == [5, 5]
    assert int(counts[1].sum()) == 24 - 10


@pytest.mark.parametrize("chunk", [0, 23])
def test_a_model_keeps_the_best_of_all_its_layers(chunk: int) -> None:
    """Against a sort of everything, in one go and where chunks are evicted between."""
    rule = selection(Hashed(), 12, allocation=BestOfAll(), sinks=2, recent=3)
    cache = prefill(selected(rule, chunk=chunk), tiny_ids(1, 60))
    held: dict[tuple[int, int], list[int]] = {(i, h): [] for i in range(4) for h in range(2)}
    for start in range(0, 60, chunk or 60):
        stop = min(start + (chunk or 60), 60)
        ranked = sorted(
            (-value(i, h, p, stop), p, i, h) for (i, h), row in held.items() for p in [*row, *range(start, stop)]
        )
        best = ranked[: 8 * 12]
        held = {(i, h): sorted(p for _, p, *row in best if row == [i, h]) for i, h in held}
    assert [kept(cache, i) for i in range(4)] == [[held[i, h] for h in range(2)] for i in range(4)]


def value(layer: int, head: int, position: int, tokens: int) -> float:
    always = position < 2 or position >= tokens - 3
    return INF if always else float(hashed(torch.tensor(position), layer, torch.tensor(head)))


def test_bytes_are_exact_in_total() -> None:
    stack = {"ghost": {"recent": 4}, "global_topk": {"budget": 0.3}, "rotate": {}}
    stack |= {"kivi": {"group": 16, "key_axis": "token", "residual": 0}}
    rows, total = prove(compiled(stack), tiny_ids(1, 100))
    assert total == sum(sum(r.kept) for r in rows) == 8 * 30
    assert len({tuple(r.kept) for r in rows}) > 1, "the case shows nothing"


def test_a_program_has_no_rows_for_it() -> None:
    plan = plan_of({"snapkv": SNAPKV, "global_topk": {}})
    with pytest.raises(KvcompileError, match=r"must follow from the length of the prompt alone.*BestOfAll"):
        refuse(plan, selected(None).config)


def test_a_score_without_one_unit_is_told_of() -> None:
    assert notes(plan_of({"snapkv": SNAPKV, "global_topk": {}})) == []
    assert notes(plan_of({"global_topk": {}})) == []
    (note,) = notes(plan_of({"knorm": {}, "global_topk": {}}))
    assert note.startswith("knorm: scores of all layers are ranked together")
    assert notes(plan_of({"knorm": {}, "adakv": {}})) == []
