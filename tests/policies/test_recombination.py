"""Scores and allocations recombine: by name, or one after the other in the stack; two of a kind are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.selection import Budget, Schedule, Selection, Uniform
from kvcompile.policies.adakv import AdaKV, AdaptiveHeads
from kvcompile.policies.base import scored_by
from kvcompile.policies.corm import CORM
from kvcompile.policies.expected_attention import ExpectedAttention
from kvcompile.policies.h2o import H2O
from kvcompile.policies.keydiff import KeyDiff
from kvcompile.policies.pyramidkv import Pyramid, PyramidKV
from kvcompile.policies.snapkv import SnapKV, WindowAttention
from kvcompile.policies.streaming import Streaming
from kvcompile.policies.zigzag import Uncertainty, ZigZag
from kvcompile.stack import apply_stack

LAYERS = 4


def plan() -> Plan:
    layers = [LayerPlan(i, query_heads=6, kv_heads=2, head_dim=8, owner=i, scale=1.0) for i in range(LAYERS)]
    return Plan("llama", "float32", tuple(layers))


def folded(*policies: Policy) -> Selection:
    layers = apply_stack(plan(), policies).layers
    assert all(p.selection == layers[0].selection for p in layers)
    assert layers[0].selection is not None
    return layers[0].selection


def test_a_score_by_name_brings_its_protected_tokens_and_schedule() -> None:
    adakv = folded(AdaKV(score="h2o", budget=0.3))
    assert adakv == replace(folded(H2O(budget=0.3)), policy="adakv", allocation=AdaptiveHeads(0.2))


def test_alone_each_allocation_takes_its_default_score() -> None:
    assert folded(AdaKV()).score == ExpectedAttention().score()
    assert folded(ZigZag()).score == SnapKV().score()
    assert folded(PyramidKV()).score == SnapKV(window=8).score()
    assert folded(PyramidKV()).recent == 8
    assert {folded(p).budget for p in (AdaKV(), ZigZag(), PyramidKV())} == {Budget(0.2)}


def test_after_a_score_only_the_allocation_changes() -> None:
    before = folded(SnapKV(budget=0.4, window=16, decode_every=8, sinks=2))
    assert folded(SnapKV(budget=0.4, window=16, decode_every=8, sinks=2), AdaKV()) == replace(
        before, allocation=AdaptiveHeads(0.2)
    )
    assert folded(KeyDiff(), PyramidKV()) == replace(folded(KeyDiff()), allocation=Pyramid(20.0))


def test_what_the_allocation_policy_says_itself_wins() -> None:
    mixed = folded(KeyDiff(budget=0.4), AdaKV(budget=0.1, sinks=9, decode_every=5, between_chunks=False))
    assert (mixed.policy, mixed.budget, mixed.sinks) == ("adakv", Budget(0.1), 9)
    assert mixed.schedule == Schedule(between_chunks=False, decode_every=5)


def test_zigzag_measures_the_whole_prompt_unpooled() -> None:
    assert folded(KeyDiff(), ZigZag(window=24)).uncertainty == WindowAttention(24)
    assert folded(ZigZag(scope="head", floor=0.5)).allocation == Uncertainty(0.9, 0.5, "head", 1.0)
    assert folded(ZigZag()).allocation.traits.cross_layer
    assert folded(ZigZag(scope="head")).allocation.traits.scope == "head"


def test_layers_that_the_score_skipped_stay_whole() -> None:
    layers = apply_stack(plan(), [KeyDiff(skip_layers=[0]), AdaKV(skip_layers=[3])]).layers
    chosen = [p.selection.allocation if p.selection else None for p in layers]
    assert chosen == [None, AdaptiveHeads(0.2), AdaptiveHeads(0.2), Uniform()]


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ((SnapKV(), KeyDiff()), "layer 0: a layer has only one selection, got 'keydiff' after 'snapkv'"),
        ((AdaKV(), KeyDiff()), "layer 0: a layer has only one selection, got 'keydiff' after 'adakv'"),
        ((AdaKV(), PyramidKV()), "layer 0: a layer has only one allocation, got 'pyramidkv' after 'adakv'"),
        ((CORM(), AdaKV()), "layer 0: a layer has only one allocation, got 'adakv' after 'corm'"),
        (
            (SnapKV(), AdaKV(score="keydiff")),
            "a layer has only one score, got stack.adakv.score=keydiff after 'snapkv'",
        ),
        ((AdaKV(score="corm"),), "score must name a policy that ranks tokens, got 'corm'"),
        ((AdaKV(score="zigzag"),), "score must name a policy that ranks tokens, got 'zigzag'"),
        ((AdaKV(score="snapvk"),), "unknown policy, got 'snapvk'. Fix: did you mean 'snapkv'?"),
        ((AdaKV(skip_layers=[4]),), r"stack.adakv: skip_layers must be in 0..3, got \[4\]"),
        ((KeyDiff(), AdaKV(skip_layers=[4])), r"stack.adakv: skip_layers must be in 0..3, got \[4\]"),
        ((Streaming(positions="compact"), AdaKV()), "compact positions need every layer and head"),
        ((SnapKV(budget=0.4), AdaKV(budget=20)), "budget must hold the 4 sinks and 32 recent tokens"),
    ],
)
def test_conflicts_name_both_sides(policies: tuple[Policy, ...], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        apply_stack(plan(), policies)


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0])
def test_budgets_out_of_range_are_refused(budget: float) -> None:
    for kind in (SnapKV, AdaKV):
        with pytest.raises(KvcompileError, match=r"budget must be in \(0, 1\] or a whole number of tokens"):
            kind(budget=budget)


def test_the_plan_knows_the_pyramid_ahead() -> None:
    kept = [apply_stack(plan(), [PyramidKV(budget=108)]).kept(i, 5000) for i in range(LAYERS)]
    assert sum(k[0] for k in kept if k) == LAYERS * 108
    assert all(k is not None and k[0] == k[1] for k in kept)


def test_options_of_a_named_score() -> None:
    assert scored_by("snapkv", window=9).recent == 9
