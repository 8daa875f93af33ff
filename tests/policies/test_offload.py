"""The policy `offload`: which layers the plan offloads, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from contract_table import KIVI8, LAYERS, plan_of
from rich.console import Console

from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.report import plan_table


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(KvcompileError, match="some layer must be offloaded, got none of 4"):
        plan_of({"offload": {"keep": 4}})
    with pytest.raises(KvcompileError, match=r"layers must be in 0\.\.3"):
        plan_of({"offload": {"layers": [4]}})
    with pytest.raises(KvcompileError, match=r"skip_layers must be in 0\.\.3"):
        plan_of({"offload": {"skip_layers": [9]}})
    with pytest.raises(KvcompileError, match="keep must be 0 or more"):
        plan_of({"offload": {"keep": -1}})
    with pytest.raises(KvcompileError, match="keep must be 0 where layers"):
        plan_of({"offload": {"keep": 1, "layers": [2]}})


@pytest.mark.parametrize(
    ("fields", "mine"),
    [({}, [0, 1, 2, 3]), ({"keep": 3}, [3]), ({"layers": [2, 0]}, [0, 2]), ({"keep": 1, "skip_layers": [2]}, [1, 3])],
)
def test_the_plan_says_which_layers_are_offloaded(fields: dict[str, Any], mine: list[int]) -> None:
    plan = plan_of({**KIVI8, "offload": fields})
    assert [p.index for p in plan.layers if p.storage.offload] == mine
    assert [x["storage"]["offload"] for x in plan.to_json()["layers"]] == [i in mine for i in range(LAYERS)]
    without = plan.map(lambda p: replace(p, storage=replace(p.storage, offload=False)))
    assert without.layers == plan_of(KIVI8).layers
    assert without.digest() != plan.digest()
    console = Console(width=160, record=True)
    plan_table.show(plan, compose(["policy=[kivi,offload]", "model=llama", "plan=only"]), console)
    assert "float32, offloaded" in console.export_text()
