"""Protects what benchmarks compare at: budgets that fill a share of the bytes read."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from contract_table import dense

from kvcompile.errors import KvcompileError

FOLDER = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture
def equal(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    import equal_bytes

    yield equal_bytes
    sys.modules.pop("equal_bytes", None)


@pytest.mark.parametrize("label", ["snapkv", "quest", "part"])
def test_the_budget_is_the_largest_that_reads_no_more_than_the_share(equal: Any, label: str) -> None:
    lines = [
        "# one a line",
        "snapkv: policy=[snapkv] stack.snapkv.budget={tokens}",
        "quest: policy=[quest] stack.quest.budget={tokens} stack.quest.skip_layers=[]",
        "part: policy=[adakv] stack.adakv.budget={part}",
        "fixed: policy=[kivi]",
    ]
    known = equal.stacks(lines, [Fraction(1, 2)])
    assert [stack.label for stack in known][-3:] == ["quest, 1/2", "part, 1/2", "fixed"]
    planner = equal.Planner(dense().config, "float32", 400)
    for stack in known:
        if stack.label.startswith(label):
            chosen = planner.fitted(stack)
            size = next(i for i in range(2, 1000) if stack.filled(i) == chosen)
            assert planner.share(chosen) <= stack.share < planner.share(stack.filled(size + 2))


def test_a_stack_that_always_reads_more_is_refused(equal: Any) -> None:
    (stack,) = equal.stacks(["quest: policy=[quest] stack.quest.budget={tokens}"], [Fraction(1, 4)])
    with pytest.raises(KvcompileError, match="as little as 1/4"):  # two of its four layers read everything
        equal.Planner(dense().config, "float32", 400).fitted(stack)
