"""Attention matching in a stack: what it comes after, what it refuses, what it writes into the plan."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Refit, Replay
from kvcompile.stack import build_stack

IDS = [[5, 6], [7, 8, 9], [10]]


def planned(*names: str, **options: dict[str, Any]) -> Plan:
    plan = describe(tiny_model("llama").config)
    for policy in build_stack(list(names), {name: options.get(name, {}) for name in names}):
        plan = policy.apply(plan)
    return plan


def test_every_selection_before_it_is_fitted() -> None:
    plan = planned("ghost", "global_topk", "attention_matching", attention_matching={"ids": IDS, "ridge": 2.0})
    for p in plan.layers:
        assert p.selection is not None
        assert p.selection.refit == Refit("attention_matching", 400, 2.0, 0.5, 16)
        assert p.selection.schedule.replay == Replay(2048, 8, (5, 6), (7, 8, 9), (10,), scores=False)
        assert not p.selection.replays
        assert p.selection.replayer == "attention_matching"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("attention_matching",), {}, "fits what a selection keeps, so it comes after one, got after nothing"),
        (("kvzip", "attention_matching"), {}, "layer 0 is read again already, got 'kvzip' before it"),
        (("leankv", "attention_matching"), {}, "must hold its entries alike, at their true positions, got 'leankv'"),
        (("streaming", "attention_matching"), {"streaming": {"positions": "compact"}}, "with compact positions"),
        (("snapkv", "attention_matching"), {"attention_matching": {"ridge": 0.0}}, "ridge must be above 0"),
        (("snapkv", "attention_matching"), {"attention_matching": {"queries": 0}}, "queries must be 1 or more"),
        (("snapkv", "attention_matching"), {"attention_matching": {"most": 2.0}}, "most must be in"),
    ],
)
def test_what_cannot_be_fitted_is_refused(names: tuple[str, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcompileError, match=message):
        planned(*names, **options)
