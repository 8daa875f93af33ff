"""Any stack is refused in one line, or compiles; what compiles does what its plan says, to each sequence of a batch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import event, example, given
from random_stacks import (
    DTYPES,
    TOLERANCE,
    Case,
    cases,
    comparable,
    compiled,
    decoded,
    kept,
    off,
    prefilled,
    random_examples,
    run,
    tolerance,
    uncompressed,
)

from kvcompile.kernels.cpp import backend
from kvcompile.plan.plan import Plan, converts
from kvcompile.stores.factory import low as low_of


def as_planned(cache: Any, case: Case) -> None:
    """After a prefill each layer holds the tokens and bytes of its plan, for every sequence."""
    plan: Plan = cache.plan
    for b, tokens in enumerate(case.lengths):
        free = total = 0
        for expected, lengths in zip(plan.bytes(1, tokens), lengths_of(cache, b, case), strict=True):
            if expected.kept is not None:
                assert lengths == list(expected.kept if lengths else ()), f"layer {expected.index}, sequence {b}"
            elif plan.layers[expected.index].selection.budget is not None:
                free, total = free + sum(lengths), total + expected.kept_total
        assert free == total, f"layers that share a budget, sequence {b}"
    for p, layer in zip(plan.layers, cache.layers, strict=True):
        if layer.store is not None:
            rows = zip(layer.store.lengths, low_of(layer.store), strict=True)
            assert layer.store.nbytes() == sum(p.nbytes(n, plan.dtype, low) for n, low in rows)
        if layer.index is not None:
            rows = [layer.store.lengths[b * p.kv_heads : (b + 1) * p.kv_heads] for b in range(len(case.lengths))]
            groups = [plan.reading(p, row, n // plan.steps)[0] for row, n in zip(rows, case.lengths, strict=True)]
            assert layer.index.nbytes() == sum(groups)


def lengths_of(cache: Any, b: int, case: Case) -> list[list[int]]:
    return [[len(at) for at in layer] for layer in kept(cache, b, len(case.lengths))]


def positions_are_true(cache: Any, case: Case) -> None:
    """What is kept was seen, once, in order but where it is grouped; the newest token is kept everywhere."""
    for b, tokens in enumerate(case.lengths):
        seen = tokens + case.new
        assert cache.seen[b] == seen
        entries = seen // cache.plan.steps  # of a block transformer, those of its block decoder
        for p, layer in zip(cache.plan.decoder.layers, kept(cache, b, len(case.lengths)), strict=False):
            for at in layer:
                regrouped = p.recall is not None and p.recall.grouping.reorders
                assert (sorted(at) if regrouped else at) == sorted(set(at))
                assert bool(at) == bool(entries)
                assert min(at, default=0) >= 0
                assert max(at, default=-1) < entries


def is_whole(cache: Any, case: Case) -> bool:
    """Whether nothing was converted, dropped, encoded or left unread, so that logits are the uncompressed model's."""
    plan, seen = cache.plan, max(case.lengths) + case.new
    if any(p.recall and 1 != p.recall.budget.value < seen for p in plan.layers):
        return False
    if converts(plan) or any(p.storage.quantized for p in plan.layers):
        return False
    if any(p.sliding_window for p in plan.selected) and cache.evictions.dropped:
        return False  # a window that is full again does not say what a selection dropped before
    least = [[p.span(n + case.new) for p in plan.layers] for n in case.lengths]
    held = [lengths_of(cache, b, case) for b in range(len(case.lengths))]
    return all(
        min(rows) >= n for spans, layers in zip(least, held, strict=True) for n, rows in zip(spans, layers, strict=True)
    )


def write_kernels(cache: Any, dtype: torch.dtype) -> None:
    """The C++ of every layer, to the text: for one token and for many, before anything is encoded and after."""
    for p in cache.plan.layers:
        for spec in (*cache.kernels.first(p.index), *cache.kernels.expected(p.index)):
            for many in (False, True):
                if dtype != torch.float64:
                    assert backend.source(spec, dtype, many)


# found by chance: one number of 31 tokens lies between two codes, and what is computed of it follows
BETWEEN_CODES = Case("mixtral", "float32", {"int8": {"residual": 1}}, 1, "sdpa", (1, 31), "left", 34)


@random_examples
@example(BETWEEN_CODES)
@given(cases())
def test_a_random_stack_is_refused_in_one_line_or_keeps_its_plan(case: Case) -> None:
    model = compiled(case)
    event("compiled" if model else "refused")
    if model is None:
        return
    everyone = list(range(len(case.lengths)))
    first, cache = prefilled(model, case, everyone)
    as_planned(cache, case)
    logits = torch.cat([first, decoded(model, case, everyone, cache)], 1)
    assert logits.isfinite().all()
    positions_are_true(cache, case)
    write_kernels(cache, DTYPES[case.dtype])
    if len(everyone) > 1:
        event("batch of N is N x 1")
        for b in everyone:
            alone, single = run(model, case, [b])
            same = kept(cache, b, len(everyone)) == kept(single, 0, 1)
            assert same or not case.exact
            if same and comparable(case, cache):
                assert off(logits[b], alone[0]) < tolerance(case, cache)
    if is_whole(cache, case) and comparable(case, cache):
        event("dense")
        for b in everyone:
            assert off(logits[b], uncompressed(case, b)[0]) < TOLERANCE[case.dtype]
