"""Storage policies: what they put into the plan, what they refuse, and where encoding stands in the graph."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from contract_table import compiled, plan_of
from rich.console import Console

from kvcompile.config.compose import compose
from kvcompile.errors import KvcompileError
from kvcompile.graph import ops
from kvcompile.plan.storage import Storage
from kvcompile.report import plan_table
from kvcompile.stack import build_policy

SMALL: dict[str, Any] = {"group": 8, "residual": 16}


def test_two_number_formats_on_one_layer_are_refused_by_name() -> None:
    for first, second in (("kivi", "int8"), ("fp8", "kivi")):
        with pytest.raises(
            KvcompileError, match=f"layer 0: a layer has only one number format.*{second}.*after.*{first}"
        ):
            plan_of({first: {}, second: {}})
    plan = plan_of({"kivi": {"skip_layers": [1, 3], **SMALL}, "int8": {"skip_layers": [0, 2]}})
    assert [p.storage.policy for p in plan.layers] == ["kivi", "int8", "kivi", "int8"]


@pytest.mark.parametrize(
    ("name", "fields", "rule"),
    [
        ("kivi", {"bits": 3}, "bits must be 2, 4 or 8"),
        ("kivi", {"key_bits": 16}, "key_bits must be 2, 4 or 8"),
        ("kivi", {"group": 0}, "group must be 1 or more"),
        ("kivi", {"group": 32, "residual": 100}, "residual must be a multiple of the group, 32"),
        ("kivi", {"residual": -32}, "residual must be 0 or more"),
        ("int8", {"residual": -1}, "residual must be 0 or more"),
        *(("paged", {"page": page}, "page must be 1 to 4,096") for page in (10**9, 10**30, 4097, 0, -1)),
    ],
)
def test_fields_out_of_range_are_refused(name: str, fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(KvcompileError, match=rule):
        build_policy(name, fields)


def test_what_cannot_be_stored_so_is_refused() -> None:
    with pytest.raises(KvcompileError, match="group must divide the head size 16"):
        plan_of({"kivi": {"group": 12, "residual": 24}})
    with pytest.raises(
        KvcompileError, match="some layer must see the whole context, got none of 4 with a cache, 0 skipped"
    ):
        plan_of({"kivi": SMALL}, "mistral")
    with pytest.raises(KvcompileError, match="none of 4 with a cache, 4 skipped"):
        plan_of({"int8": {"skip_layers": [0, 1, 2, 3]}})
    with pytest.raises(KvcompileError, match="some layer must lie in pages, got none of 4"):
        plan_of({"paged": {"skip_layers": [0, 1, 2, 3]}})
    with pytest.raises(KvcompileError, match=r"skip_layers must be in 0\.\.3"):
        plan_of({"int8": {"skip_layers": [4]}})
    with pytest.raises(KvcompileError, match="compact positions rotate stored keys"):
        plan_of({"streaming": {"positions": "compact"}, "kivi": SMALL})
    with pytest.raises(KvcompileError, match="selection policies come before storage policies"):
        plan_of({"kivi": SMALL, "snapkv": {}})


def test_a_layer_that_reads_anothers_cache_is_named_with_the_fix() -> None:
    """A plug-in may set what the built-in policies leave alone; its error is a sentence, not a name of a rule."""
    plan = plan_of({"cla": {}})
    wrong = plan.map(lambda p: replace(p, storage=Storage(policy="mine", rotated=True)))
    (index, owner) = next((p.index, p.owner) for p in plan.layers if p.owner != p.index)
    says = (
        f"mine: layer {index} has no cache of its own, so how it is stored cannot be set, got a layer that reads layer "
        f"{owner}'s. Fix: stack.mine.skip_layers=\\[{index}\\]."
    )
    with pytest.raises(KvcompileError, match=says):
        wrong.check()


def test_the_plan_holds_the_policy_as_data() -> None:
    one, other = plan_of({"kivi": SMALL}), plan_of({"kivi": {**SMALL, "value_bits": 2}})
    assert one.digest() != other.digest()
    stored = other.to_json()["layers"][0]["storage"]
    assert stored["key"]["kind"] == "int4"
    assert stored["value"]["kind"] == "int2"
    assert (stored["residual"], stored["policy"], stored["rotated"]) == (16, "kivi", False)


def test_the_planning_table_shows_the_precision() -> None:
    config, out = compose(["policy=[rotate,int8]", "model=llama", "plan=only"]), io.StringIO()
    plan_table.show(plan_of({"rotate": {}, "int8": {"residual": 5}}), config, Console(file=out, width=160))
    assert "int8t rotated, newest 5 float32" in out.getvalue()


def test_encoding_comes_after_the_selection_of_its_layer() -> None:
    """`flush` after `compress`, after the one `allocate` of layers that share a budget, else after the last reader."""
    for stack, before in (
        ({"snapkv": {"budget": 0.5}}, ops.compress),
        ({"snapkv": {"budget": 0.5}, "zigzag": {}}, ops.allocate),
        ({}, ops.attend),
    ):
        model = compiled({**stack, "kivi": SMALL})
        nodes = list(model.kvcompile.graph.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        flushed = {node.args[2]: place[node] for node in nodes if node.target is ops.flush}
        assert sorted(flushed) == [0, 1, 2, 3]
        ahead = [node for node in nodes if node.target is before]
        for node in ahead:
            for layer in node.args[1] if before is ops.allocate else [node.args[3]]:
                assert place[node] < flushed[layer]
        assert len(ahead) == (1 if before is ops.allocate else 4)
        assert model.kvcompile.changes["InsertSettling"] == 4


def test_gemma_leaves_its_sliding_layers_alone() -> None:
    model = compiled({"kivi": SMALL}, "gemma2")
    flushed = [n.args[2] for n in model.kvcompile.graph.graph.nodes if n.target is ops.flush]
    assert flushed == [1, 3]
    assert [p.storage.quantized for p in model.kvcompile.plan.layers] == [False, True, False, True]
