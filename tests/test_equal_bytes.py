"""Protects what benchmarks compare at: budgets that fill a share of the bytes read, and the intervals in tables."""

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
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(FOLDER)
    import equal_bytes
    import intervals

    yield equal_bytes, intervals
    for name in ("equal_bytes", "intervals"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("label", ["snapkv", "quest", "part"])
def test_the_budget_is_the_largest_that_reads_no_more_than_the_share(modules: tuple[Any, Any], label: str) -> None:
    equal, _ = modules
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
            assert planner.read(chosen) <= stack.share < planner.read(stack.filled(size + 2))


def test_a_stack_that_always_reads_more_is_refused(modules: tuple[Any, Any]) -> None:
    equal, _ = modules
    (stack,) = equal.stacks(["quest: policy=[quest] stack.quest.budget={tokens}"], [Fraction(1, 4)])
    with pytest.raises(KvcompileError, match="read as little as 1/4"):  # two of its four layers read everything
        equal.Planner(dense().config, "float32", 400).fitted(stack)


def test_intervals_are_those_of_the_books(modules: tuple[Any, Any]) -> None:
    _, intervals = modules
    assert intervals.wilson(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-4)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    middle, low, high = intervals.ratio([1.1, 1.3, 1.2], [1.0, 1.0, 1.0])
    assert middle == pytest.approx(2.718281828**0.2)
    assert 1 < low < middle < high
