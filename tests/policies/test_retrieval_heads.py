"""The retrieval heads keep everything, the others exactly their budget, and a plan says so before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Uniform
from kvcompile.policies.retrieval_heads import HeadShares, RetrievalHeads
from kvcompile.stack import apply_stack, build_policy

HEADS = [[2, 1], [0, 0], [2, 0]]


def plan() -> Plan:
    return describe(tiny_config("llama"), "float32")


def planned(**options: Any) -> Plan:
    return apply_stack(plan(), [build_policy("retrieval_heads", options)])


def test_retrieval_heads_keep_all_and_the_others_their_budget() -> None:
    found = planned(heads=HEADS, budget=10, sinks=2, recent=4)
    assert [found.kept(i, 50) for i in range(4)] == [(50, 10), (10, 10), (50, 50), (10, 10)]
    assert [row.kept_total for row in found.bytes(1, 50)] == [60, 20, 100, 20]


def test_a_prompt_shorter_than_the_budget_stays_whole() -> None:
    found = planned(heads=HEADS, budget=10, sinks=2, recent=4)
    assert [found.kept(i, 8) for i in range(4)] == [(8, 8)] * 4


def test_only_layers_with_retrieval_heads_differ_by_head() -> None:
    selections = [p.selection for p in planned(heads=HEADS).layers]
    kinds = [type(s.allocation) for s in selections if s is not None]
    assert kinds == [HeadShares, Uniform, HeadShares, Uniform]


def test_keep_is_a_share_of_the_tokens() -> None:
    found = planned(heads=HEADS, keep=0.5, score="snapkv", budget=10, sinks=2, recent=4)
    assert found.kept(0, 50) == (25, 10)
    assert found.kept(0, 12) == (10, 10), "never less than the other heads"


def test_the_plan_before_calibration_has_the_right_size_and_says_that_it_is_an_estimate() -> None:
    estimate, final = planned(fraction=3 / 8), planned(heads=HEADS)
    assert sum(r.bytes for r in estimate.bytes(1, 100)) == sum(r.bytes for r in final.bytes(1, 100))
    flags = [layer["selection"]["allocation"].get("calibrated") for layer in estimate.to_json()["layers"]]
    assert False in flags
    assert True not in flags


def test_skipped_layers_stay_whole() -> None:
    found = planned(heads=HEADS, skip_layers=[1])
    assert found.layers[1].selection is None
    assert found.kept(1, 100) == (100, 100)


@pytest.mark.parametrize("pair", [[4, 0], [0, 2], [-1, 0]])
def test_heads_that_the_model_lacks_are_refused(pair: list[int]) -> None:
    with pytest.raises(KvcompileError, match=r"heads must be \[layer, kv_head\]"):
        planned(heads=[pair])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5}, "score must be another"),
        ({"keep": 0.0}, "keep must be"),
        ({"fraction": 0.0}, "fraction must be"),
        ({"budget": 2.5}, "budget must be"),
        ({"heads": [[1]]}, "heads must be"),
        ({"budget": 20, "recent": 32}, "budget must hold"),
        ({"score": "snapvk"}, "snapkv"),
        ({"score": "corm"}, "score must"),
        ({"score": "retrieval_heads"}, "score must name"),
        ({"skip_layers": [9]}, "skip_layers"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        planned(**options)


def test_given_heads_need_no_calibration() -> None:
    policy = RetrievalHeads(heads=HEADS)
    assert policy.calibrated(None) is policy  # type: ignore[arg-type]


def test_calibration_needs_a_tokenizer() -> None:
    from kvcompile.calibration.probe import ModelCalibrator

    with pytest.raises(KvcompileError, match="tokenizer"):
        RetrievalHeads().calibrated(ModelCalibrator(tiny_model(), None, lambda *_: None))


def test_calibration_finds_heads_of_the_model_and_keeps_everything_else() -> None:
    from kvcompile.calibration.probe import ModelCalibrator

    policy = RetrievalHeads(fraction=0.375, samples=1, tokens=128, budget=20, recent=8)
    found = policy.calibrated(ModelCalibrator(tiny_model(), tiny_tokenizer(), lambda *_: None))
    assert len({tuple(pair) for pair in found.heads}) == 3
    assert [found.budget, found.recent, found.samples] == [20, 8, 1]
    apply_stack(plan(), [found])


def test_layers_with_nothing_to_rank_do_not_pay_for_a_score() -> None:
    def scores(budget: float) -> list[str]:
        found = planned(heads=HEADS, keep=0.5, score="snapkv", budget=budget, sinks=2, recent=4)
        return [type(p.selection.score).__name__ for p in found.layers if p.selection is not None]

    assert scores(6) == ["WindowAttention", "Recency", "WindowAttention", "Recency"]
    assert scores(10) == scores(0.2) == ["WindowAttention"] * 4


@pytest.mark.parametrize("every", [0, 4])
def test_the_cache_holds_what_the_plan_says_and_stays_bounded_while_decoding(every: int) -> None:
    found = planned(heads=HEADS, budget=10, sinks=2, recent=4, decode_every=every)
    model = compile_plan(tiny_model(), found)
    ids = tiny_ids(1, 40)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    lengths = [[len(p) for _, _, p in layer.held.rows()] for layer in out.past_key_values.layers]
    assert [n for row, mine in zip(lengths, [[0], [], [0, 1], []]) for h, n in enumerate(row) if h in mine] == [48] * 3
    others = [n for row, mine in zip(lengths, [[0], [], [0, 1], []]) for h, n in enumerate(row) if h not in mine]
    assert others == [10 if every else 18] * 5


def test_window_and_sinks_are_what_the_others_hold() -> None:
    model = compile_plan(tiny_model(), planned(heads=HEADS, budget=10, sinks=2, recent=4))
    with torch.no_grad():
        cache = model(tiny_ids(1, 40), use_cache=True).past_key_values
    _, _, positions = next(iter(cache.layers[1].held.rows()))
    assert positions.tolist() == [0, 1, *range(32, 40)]
