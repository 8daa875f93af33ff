"""What a program of fixed shape cannot express is refused from the plan alone, with the reason."""

from __future__ import annotations

import pytest
from programs import planned

from kvcompile.errors import KvcompileError
from kvcompile.program.refuse import refuse

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
    with pytest.raises(KvcompileError, match=reason):
        refuse(*planned("llama", overrides))


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    refuse(*planned("llama", TAKEN[name]))


def test_angles_that_depend_on_the_length_are_refused() -> None:
    plan, config = planned("llama", [])
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(KvcompileError, match="'dynamic'"):
        refuse(plan, config)
