"""Protects solved budgets: the largest that fits, by the plan alone, and stacks as a command line and a recipe."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from contract_table import dense

from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.searching.fit import Fitter, OverBytes, as_part
from kvcompile.searching.stack import DENSE, FIT, Stack
from kvcompile.stack import plan_stack

INT4 = {"rotate": {}, "kivi": {"key_axis": "token", "group": 16, "residual": 0}}


@pytest.fixture(scope="module")
def fitter() -> Fitter:
    return Fitter(dense().config, 400)


@pytest.mark.parametrize(
    "options",
    [
        {"snapkv": {"budget": FIT}},
        {"snapkv": {"budget": FIT}, "global_topk": {}, **INT4},
        {"expected_attention": {"budget": FIT}, "adakv": {"safeguard": 0.1}, "int8": {}},
        {"retrieval_heads": {"keep": FIT, "fraction": 0.75, "score": "snapkv", "budget": 16, "recent": 8}},
        {"ghost": {"budget": FIT}, "head_budgets": {"budget": FIT}},
    ],
)
@pytest.mark.parametrize("most", [Fraction(1, 3), Fraction(2, 9)])
def test_the_budget_is_the_largest_that_fits(fitter: Fitter, options: dict[str, Any], most: Fraction) -> None:
    stack, share = fitter.fitted(Stack(options), most)
    name, key = next((n, k) for n, fields in options.items() for k, v in fields.items() if v == FIT)
    budget = stack.options[name][key]
    assert share == fitter.share(stack) <= most
    assert fitter.share(Stack(options).filled(budget + 0.004)) > most


def test_a_share_counts_codes_scales_and_positions_of_a_bfloat16_cache(fitter: Fitter) -> None:
    stack = Stack({"snapkv": {"budget": 0.25}})  # 4 layers, 2 heads, 100 tokens, 16 channels
    assert fitter.share(stack) == Fraction(4 * 2 * 100 * (2 * 16 * 2 + 4), 4 * 2 * 400 * 2 * 16 * 2)
    assert fitter.share(DENSE) == 1 + Fraction(4, 64)


def test_what_cannot_be_is_refused_without_weights(fitter: Fitter) -> None:
    with pytest.raises(OverBytes, match=r"kivi: at most 1/24.0 of the bfloat16 bytes may be held, got 1/\d") as over:
        fitter.fitted(Stack({"kivi": {}}), Fraction(1, 24))
    assert over.value.share > Fraction(1, 24)
    with pytest.raises(OverBytes):
        fitter.fitted(Stack({"snapkv": {"budget": FIT, "window": 64}}), Fraction(1, 24))
    with pytest.raises(KvcompileError, match="selection policies come before storage") as order:
        fitter.fitted(Stack({"kivi": {}, "snapkv": {"budget": FIT}}), Fraction(1, 24))
    assert not isinstance(order.value, OverBytes)


def test_a_stack_is_the_same_as_its_command_line() -> None:
    options = {"snapkv": {"budget": 0.137, "kernel": 31, "window": 32, "skip_layers": [0, 2]}, "rotate": {}, "int8": {}}
    stack = Stack(options)
    assert stack.overrides == (
        "policy=[snapkv,rotate,int8]",
        "stack.snapkv.budget=0.137",
        "stack.snapkv.kernel=31",
        "stack.snapkv.skip_layers=[0,2]",
    )
    identity = Fitter(dense().config, 400).identity
    config = compose(stack.overrides)
    assert plan_stack(identity, config.policies()).plan == plan_stack(identity, stack.policies()).plan
    assert config.policies() == stack.policies() == stack.entry.config().policies()
    assert DENSE.entry.fixed


def test_shares_are_shown_as_parts() -> None:
    assert [as_part(x) for x in (Fraction(1, 24), 0.5, 0)] == ["1/24.0", "1/2.0", "0"]
