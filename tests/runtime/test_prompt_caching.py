"""`copy.deepcopy(past_key_values)`, as transformers' users keep the cache of a common prefix: of every layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from contract_table import KIVI8, Options, compiled, kept_positions
from tiny import tiny_ids
from torch import Tensor

PREFIX, REST, NEW = 40, 6, 36  # far enough to encode while decoding
ADAKV: Options = {"adakv": {"budget": 24, "decode_every": 8}}
STACKS: dict[str, Options] = {
    "dense": {},
    "ragged": ADAKV,
    "sums of attention": {"h2o": {"budget": 24, "decode_every": 4}},
    "compact": {"streaming": {"budget": 24, "positions": "compact", "decode_every": 8}},
    "quantized": KIVI8,
    "paged": {"paged": {"page": 4}},
    "ragged, quantized, paged": {**ADAKV, **KIVI8, "paged": {"page": 4}},
    "offloaded": {"offload": {"keep": 1}},
    "quantized, paged, offloaded": {**KIVI8, "paged": {"page": 4}, "offload": {}},
    "latents": {"mla": {"factor": "weights", "select": "uniform"}},
}


def answered(model: Any, ids: Tensor, cache: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)


def contents(cache: Any) -> list[Tensor]:
    """Every key, value and position held, as it is now."""
    return [x.clone() for layer in cache.layers if layer.store is not None for row in layer.held.rows() for x in row]


@torch.no_grad()
@pytest.mark.parametrize("name", STACKS)
def test_a_copy_of_a_prefix_serves_many_prompts(name: str) -> None:
    """Each prompt gets what it gets with a cache of its own, and the original stays what it was."""
    model, prefix = compiled(STACKS[name]), tiny_ids(1, PREFIX)
    prompts = [torch.cat((prefix, tiny_ids(1, REST, seed)), 1) for seed in (1, 2)]

    def read() -> Any:
        return model(prefix).past_key_values

    kept = read()
    before, facts = contents(kept), (list(kept.seen), kept.tick, kept.croppable, copy.deepcopy(kept.evictions))
    for prompt in prompts:
        mine, alone = copy.deepcopy(kept), read()
        assert mine.plan is kept.plan
        assert torch.equal(answered(model, prompt, mine), answered(model, prompt, alone))
        assert kept_positions(mine) == kept_positions(alone)
        assert all(torch.equal(x, y) for x, y in zip(contents(kept), before, strict=True))
        assert (kept.seen, kept.tick, kept.croppable, kept.evictions) == facts


def test_a_copy_shares_full_pages() -> None:
    model = compiled({"paged": {"page": 4}})
    with torch.no_grad():
        kept = model(tiny_ids(1, PREFIX)).past_key_values
        (first, *_) = [layer.held.pages.pool for layer in kept.layers]
        copies = [copy.deepcopy(kept) for _ in range(5)]
        assert all(layer.held.pages.pool is first for layer in (c.layers[0] for c in copies))
