"""What a score needs and how an allocation splits: records that a plan does not hold, open to other packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import compiled, planned
from selecting import AllAttention, Expected, Hashed
from tiny import tiny_ids
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.exporters.static.supports import refuse
from kvcompile.plan.selection import Needs, Score, Traits
from kvcompile.runtime.observation import Observation
from kvcompile.stack import discover

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "add-a-score.md").read_text("utf-8")


@pytest.mark.parametrize("wrong", [{"reduce": "avg"}, {"queries": -1}, {"moments": -2}], ids=str)
def test_needs_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KvcompileError, match="Needs: "):
        Needs(**wrong)


def test_a_score_needs_nothing_unless_it_says_so() -> None:
    assert Hashed().needs == Needs()
    assert AllAttention().needs == Needs(queries=None, carries=True)
    assert Expected(3).needs == Needs(moments=3), "which follow from fields"


def test_the_page_names_every_field() -> None:
    fields = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    assert fields == ["Needs", *(f.name for f in fields_of(Needs)), "Traits", *(f.name for f in fields_of(Traits))]


def test_a_plan_does_not_hold_needs() -> None:
    """Its digest, and what an artifact compares, follow from a score's fields alone."""
    plan, _ = planned("llama", ["policy=[snapkv,adakv]"])
    held = plan.to_json()["layers"][0]["selection"]
    assert list(held["score"]) == ["type", "window", "kernel", "pooling", "reduce"]
    assert list(held["allocation"]) == ["type", "safeguard"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The page's package, installed: one module and its entry points."""
    (module,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (points,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    info = tmp_path / "kvcompile_vatp-0.1.0.dist-info"
    info.mkdir()
    (tmp_path / "vatp.py").write_text(module, "utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvcompile-vatp\nVersion: 0.1.0\n", "utf-8")
    points = points.replace('project.entry-points."kvcompile.policies"', "kvcompile.policies").replace('"', "")
    (info / "entry_points.txt").write_text(points, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    discover.cache_clear()
    import vatp  # type: ignore[import-not-found]

    yield vatp
    discover.cache_clear()


def test_a_score_and_an_allocation_of_another_package(elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The score sees the 16 queries that it asked for; the allocation's heads differ, and spend the budget."""
    widths, whole = list[int](), elsewhere.ValueAwareAttention.score

    def score(self: Score, seen: Observation) -> Tensor:
        widths.append(seen.queries.shape[2])
        return whole(self, seen)  # type: ignore[no-any-return]

    monkeypatch.setattr(elsewhere.ValueAwareAttention, "score", score)
    model = compiled("llama", ["policy=[vatp,anywhere]", "budget=0.25"])
    with torch.no_grad():
        lengths = model(tiny_ids(1, 120)).past_key_values.lengths()
    assert widths == [16] * 4
    assert [sum(rows) for rows in lengths] == [2 * 30] * 4
    assert any(len(set(rows)) > 1 for rows in lengths)


def test_what_its_traits_do_not_promise_is_refused_in_an_export(elsewhere: Any) -> None:
    refuse(*planned("llama", ["policy=[vatp]"]))
    with pytest.raises(KvcompileError, match="BestAnywhere, which looks at the scores"):
        refuse(*planned("llama", ["policy=[vatp,anywhere]"]))


def test_heads_that_differ_have_no_compact_positions(elsewhere: Any) -> None:
    with pytest.raises(KvcompileError, match="every layer and head to keep the same tokens"):
        planned("llama", ["policy=[streaming,anywhere]", "stack.streaming.positions=compact"])
