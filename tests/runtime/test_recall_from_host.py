"""Layers that are offloaded and recall: a step brings what it chose to the device, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract_table import KIVI8, Options, compiled
from tiny import tiny_ids
from torch import Tensor

from kvcompile.stores.host import Host

QUEST: Options = {"quest": {"budget": 8, "page": 4, "sinks": 3, "recent": 5, "every": 4, "skip_layers": []}}
PROMPT, STEPS = 60, 24
STACKS: dict[str, Options] = {
    "quest": QUEST,
    "quest, kivi": {**QUEST, **KIVI8},
    "quest, paged": {**QUEST, "paged": {"page": 4}},
    "quest, kivi, paged": {**QUEST, **KIVI8, "paged": {"page": 4}},
    "snapkv, quest": {"snapkv": {"budget": 40, "window": 8, "kernel": 3}, **QUEST},
    "mla, quest": {"mla": {"factor": "weights", "select": "uniform"}, **QUEST},
}
every_stack = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


def decoded(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """Logits of each step after the prompt, and the cache."""
    with torch.no_grad():
        cache = model(ids[:, :PROMPT], logits_to_keep=1).past_key_values
        logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, ids.shape[1])]
    return torch.cat(logits, 1), cache


@every_stack
def test_what_is_recalled_from_the_host_is_what_would_be_read_on_the_device(stack: Options) -> None:
    ids = tiny_ids(2, PROMPT + STEPS)
    expected, _ = decoded(compiled(stack), ids)
    logits, cache = decoded(compiled({**stack, "offload": {}}), ids)
    torch.testing.assert_close(logits, expected, atol=0, rtol=0)
    assert all(layer.transfer.on_host for layer in cache.layers)
    assert cache.in_host_memory() >= cache.nbytes()


@pytest.mark.parametrize("storage", [{}, {"paged": {"page": 4}}], ids=["dense", "paged"])
def test_a_step_moves_what_it_reads(storage: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = compiled({**QUEST, **storage, "offload": {}}), tiny_ids(1, 201)
    with torch.no_grad():
        cache = model(ids[:, :200], logits_to_keep=1).past_key_values
    moved: list[Tensor] = []
    near = Host.near
    monkeypatch.setattr(Host, "near", lambda self, x: moved.append(x) or near(self, x))
    cache.reads = {}
    with torch.no_grad():
        model(ids[:, 200:], past_key_values=cache)
    keys_and_values = sum(x.numel() * x.element_size() for x in moved if x.dtype == torch.float32)
    assert keys_and_values == sum(cache.reads.values()) - cache.index_bytes()
    assert keys_and_values < cache.nbytes() / 5
    assert sum(x.numel() * x.element_size() for x in moved) < 1.2 * keys_and_values  # positions and tables
