"""What a program of fixed shape cannot express is refused from the plan alone, with the reason."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch.fx as fx
from programs import planned
from torch import nn

from kvcompile.errors import KvcompileError
from kvcompile.exporters.registry import build_exporters, require_open
from kvcompile.exporters.static.capacity import Limits, rooms
from kvcompile.exporters.static.lower import _require_lowered
from kvcompile.exporters.static.modules import traceable
from kvcompile.exporters.static.supports import refuse
from kvcompile.exporters.torch_export import TorchProgram
from kvcompile.graph import ops

REFUSED = {
    "moments of queries to come": (
        ["policy=expected_attention", "stack.expected_attention.decode_every=8"],
        "of the prompt alone",
    ),
    "a seeded generator": (["policy=random"], "tensor operations"),
    "budgets of layers, while decoding": (
        ["policy=[snapkv,zigzag]", "stack.zigzag.decode_every=8"],
        "decided once",
    ),
    "budgets of layers and heads, encoded": (["policy=[zigzag,kivi]", "stack.zigzag.scope=adaptive"], "plain numbers"),
    "budgets from scores, while decoding": (["policy=[snapkv,adakv]", "stack.adakv.decode_every=8"], "decided once"),
    "budgets from scores, encoded": (["policy=[snapkv,adakv,kivi]"], "plain numbers"),
    "a threshold": (["policy=corm"], "length of the prompt"),
    "codes that lose tokens later": (["policy=[streaming,kivi]"], "while decoding"),
    "pages": (["policy=paged"], "contiguous"),
    "what is read is chosen": (["policy=quest"], "each step of a program reads all that a row holds"),
    "what is read of a selection is chosen": (
        ["policy=[snapkv,quest]", "stack.snapkv.decode_every=0"],
        "'quest', which chooses what a step reads",
    ),
    "another device": (["policy=offload"], "one device"),
    "moved keys": (["policy=streaming", "stack.streaming.positions=compact"], "true positions"),
    "evictions between chunks": (["policy=snapkv", "prefill_chunk=16"], "one piece"),
}
TAKEN = {
    "chunks, one eviction": ["policy=snapkv", "prefill_chunk=16", "stack.snapkv.between_chunks=false"],
    "chunks, no eviction": ["policy=cla", "prefill_chunk=16"],
    "codes": ["policy=[snapkv,kivi]"],
    "rotated": ["policy=[pyramidkv,rotate]"],
    "latents": ["policy=[mla,snapkv]"],
    "budgets from scores, by head": ["policy=[snapkv,adakv]"],
    "budgets from scores, by layer": ["policy=zigzag"],
    "budgets from scores, by layer, encoded": ["policy=[zigzag,kivi]"],
    "a recipe": ["recipe=zigzag"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    overrides, reason = REFUSED[name]
    with pytest.raises(KvcompileError, match=reason) as caught:
        refuse(*planned("llama", overrides))
    assert caught.value.fix


def test_heads_that_share_a_row_take_plain_logits() -> None:
    with pytest.raises(KvcompileError, match=r"plain logits, got soft-cap 5\. Fix: drop the policy that lets heads"):
        refuse(*planned("gemma2", ["policy=[snapkv,adakv]"]))


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    refuse(*planned("llama", TAKEN[name]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"new": 10**8}, r"export.torch: new must be 1 to 1048576, got 100000000"),
        ({"prompt": 10**8}, r"export.torch: prompt must be 2 to 1048576, got 100000000"),
        (
            {"batch": 10**9},
            r"export=torch: the cache .* must fit .*batch=1000000000, .* Fix: smaller export.torch",
        ),
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_from_the_plan_alone(sizes: dict[str, int], message: str) -> None:
    plan, config = planned("llama", ["policy=snapkv"])
    with pytest.raises(KvcompileError, match=message):
        require_open(build_exporters({"torch": sizes}), plan, config)


def test_a_cache_takes_at_least_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than programs get: room for every token, for those after the prompt, or unknown."""
    exporter = TorchProgram(batch=3, prompt=40, new=9)
    for overrides, entries in (([], 49), (["policy=snapkv"], 9), (["policy=streaming"], 0), (["policy=mla"], 49)):
        plan, config = planned("llama", overrides)
        least = 3 * sum(p.kv_heads * p.nbytes(entries, "float32") for p in plan.layers)
        held = 3 * sum(r.rows * r.plan.nbytes(r.capacity, "float32") for r in rooms(plan, Limits(3, 40, 9)))
        assert least <= held
        for memory in (least - 1, least):
            monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: SimpleNamespace(total=memory))
            with nullcontext() if memory == least else pytest.raises(KvcompileError, match="must fit"):
                exporter.refuse(plan, config)


def test_angles_that_depend_on_the_length_are_refused() -> None:
    plan, config = planned("llama", [])
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(KvcompileError, match=r"'dynamic'\. Fix: export=\[hf\]"):
        refuse(plan, config)


def test_what_the_tracer_cannot_follow_is_one_line_with_a_fix() -> None:
    with (
        pytest.raises(KvcompileError, match=r"traceable, got ValueError: first\. Fix: ") as caught,
        traceable(nn.Identity()),
    ):
        raise ValueError("first\nsecond")
    assert "\n" not in str(caught.value)


def test_a_node_that_no_program_has_is_named_with_a_fix() -> None:
    graph = fx.Graph()
    graph.call_function(ops.fetch, (graph.placeholder("cache"), None, 0))
    with pytest.raises(KvcompileError, match=r"every node of the graph, got fetch\. Fix: drop the policy"):
        _require_lowered(graph)
