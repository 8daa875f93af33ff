"""Calibrated budgets: exact sums, each layer by itself, and the shares that the best of all heads have on texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer

from kvcompile.adapters.architectures import describe
from kvcompile.calibration.budgets import head_shares, pieces
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.policies.head_budgets import CalibratedHeads, HeadBudgets
from kvcompile.stack import apply_stack, build_policy, build_stack

SHARES = [[0.5, 0.1], [0.0, 0.05], [0.2, 0.1], [0.05, 0.0]]
SENTENCES = [" ".join(f"w{(7 * i + j * j) % 120 + 4}" for j in range(12)) for i in range(40)]


def planned(family: str = "llama", **options: Any) -> Plan:
    stack = {"snapkv": {"window": 4, "sinks": 2}, "head_budgets": {"budget": 0.2, **options}}
    return apply_stack(describe(tiny_config(family), "float32"), build_stack(list(stack), stack))


def kept(plan: Plan, tokens: int) -> list[int]:
    return [n for p in plan.layers for n in plan.kept(p.index, tokens) or ()]


def test_each_head_keeps_what_always_stays_and_its_share_of_the_rest() -> None:
    assert kept(planned(shares=SHARES), 100) == [62, 17, 6, 12, 28, 17, 12, 6]  # 6 + share * (160 - 48)


@pytest.mark.parametrize("tokens", [1, 5, 7, 30, 100, 999])
@pytest.mark.parametrize("budget", [0.1, 0.2, 0.55, 0.9, 1.0, 12, 40])
def test_the_sum_is_exact_and_no_head_keeps_more_than_there_is(tokens: int, budget: float) -> None:
    found, uniform = planned(shares=SHARES, budget=budget), planned(budget=budget)
    counts = kept(found, tokens)
    assert sum(counts) == sum(kept(uniform, tokens))
    assert min(tokens, 6) <= min(counts)
    assert max(counts) <= tokens


def test_what_one_head_cannot_hold_goes_to_the_others_by_their_shares() -> None:
    counts = kept(planned(shares=[[0.9, 0.0], [0.0, 0.0], [0.08, 0.02], [0.0, 0.0]], budget=0.3), 100)
    assert counts[0] == 100
    assert counts[4] - 6 == pytest.approx(4 * (counts[5] - 6), abs=2)


def test_nothing_depends_on_the_input_or_on_other_layers() -> None:
    selections = [p.selection for p in planned(shares=SHARES).layers]
    assert all(s is not None and not s.allocation.traits.cross_layer for s in selections)
    model = compile_plan(tiny_model(), planned(shares=SHARES))
    with torch.no_grad():
        cache = model(tiny_ids(1, 50)).past_key_values
    assert [n for layer in cache.lengths() for n in layer] == kept(planned(shares=SHARES), 50)


def test_the_estimate_has_the_right_sum_and_says_that_it_is_one() -> None:
    estimate = planned()
    assert {s.allocation.calibrated for p in estimate.layers if (s := p.selection)} == {False}
    assert sum(r.bytes for r in estimate.bytes(1, 100)) == sum(r.bytes for r in planned(shares=SHARES).bytes(1, 100))


def test_layers_that_see_as_many_tokens_share_their_part_of_the_budget() -> None:
    plan = planned("gemma2", shares=SHARES, budget=16)
    tables = {p.sliding_window: p.selection.allocation.shares for p in plan.layers if p.selection}
    assert len(tables) == 2
    assert sum(map(len, tables.values())) == len(plan.layers)
    assert sum(kept(plan, 100)) == sum(kept(planned("gemma2", budget=16), 100))


@pytest.mark.parametrize("shares", [SHARES[:3], [[0.5]] * 4])
def test_shares_of_another_model_are_refused(shares: list[list[float]]) -> None:
    with pytest.raises(KvcompileError, match="a number for each KV head"):
        planned(shares=shares)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": [[-0.1, 0.2]]}, "shares must be"),
        ({"shares": [[0.0, 0.0]]}, "shares must be"),
        ({"shares": [[float("inf"), 0.0]]}, "shares must be"),
        ({"shares": [[float("nan")]]}, "shares must be"),
        ({"samples": 0}, "samples must be"),
        ({"tokens": 60}, "tokens must be"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        build_policy("head_budgets", options)


def test_calibration_needs_a_tokenizer_and_given_shares_do_not() -> None:
    with pytest.raises(KvcompileError, match="tokenizer"):
        HeadBudgets().calibrated(ModelCalibrator(tiny_model(), None, lambda *_: None))
    policy = HeadBudgets(shares=SHARES)
    assert policy.calibrated(None) is policy  # type: ignore[arg-type]


class Keeping:
    """A calibrator whose selection keeps the same of every text."""

    def __init__(self, kept: list[list[int]], floor: int) -> None:
        self.tokenizer, self.answer, self.seen = tiny_tokenizer(), (kept, [floor] * len(kept)), []

    def progress(self, text: str, done: int, total: int) -> None:
        self.seen.append((done, total))

    def kept(self, ids: torch.Tensor, selection: object) -> tuple[list[list[int]], list[int]]:
        return self.answer


def shares(kept: list[list[int]], floor: int = 5) -> list[list[float]]:
    return head_shares(Keeping(kept, floor), SENTENCES, None, samples=2, tokens=128, seed=0)  # type: ignore[arg-type]


def test_shares_are_of_what_is_left_after_what_always_stays() -> None:
    assert shares([[35, 5], [15, 5]]) == [[0.75, 0.0], [0.25, 0.0]]


@pytest.mark.parametrize("kept", [[[5, 5]], [[128, 128]]])
def test_a_budget_that_shares_out_nothing_is_refused(kept: list[list[int]]) -> None:
    with pytest.raises(KvcompileError, match="a part of the tokens stays"):
        shares(kept)


def test_calibration_finds_what_global_topk_gives() -> None:
    policy = HeadBudgets(score="dropkv", budget=0.3, samples=2, tokens=128)
    calibrator = ModelCalibrator(tiny_model(), tiny_tokenizer(), lambda *_: None)
    found = policy.calibrated(calibrator)
    from kvcompile.calibration.text import sentences

    best = [build_policy("global_topk", {"score": "dropkv", "budget": 0.3})]
    model, expected = compile_plan(tiny_model(), apply_stack(describe(tiny_config("llama"), "float32"), best)), 0.0
    floor = model.kvcompile.plan.layers[0].selection.resolve(128)[1]
    for ids in pieces(tiny_tokenizer(), sentences(), 2, 128, 0):
        with torch.no_grad():
            free = torch.tensor(model(ids).past_key_values.lengths(), dtype=torch.float64) - floor
        expected = expected + free / free.sum() / 2
    assert torch.allclose(torch.tensor(found.shares, dtype=torch.float64), expected, atol=1e-5)
    (selection,) = {p.selection for p in apply_stack(describe(tiny_config("llama"), "float32"), [found]).layers[:1]}
    assert isinstance(selection.allocation, CalibratedHeads)


def test_texts_begin_elsewhere_with_another_seed() -> None:
    one, same, other = (pieces(tiny_tokenizer(), SENTENCES, 2, 128, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert not torch.equal(one[0], one[1])
