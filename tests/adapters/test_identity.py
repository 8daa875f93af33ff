"""Identity stack: with nothing dropped, the traced model with our adapters and cache is the original model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, rotary, tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import architecture_of, describe
from kvcompile.graph.tracer import trace
from kvcompile.runtime.cache import KVCache

TOKENS = 40  # more than twice the sliding window
DECODE = [0, 37, 38, 39, 40]  # a prefill and three decoded tokens
CHUNKED = [0, 20, 37, 38, 40]  # a prefill in two chunks, then one token and two at once


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def original(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    cache, logits = None, []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for a, b in pairwise(cuts):
        out = model(
            ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def compiled(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    dtype = str(model.dtype).removeprefix("torch.")
    plan = describe(model.config, dtype)
    architecture_of(model.config).swap(model, describe(model.config))
    graph = trace(model)
    cache = KVCache(plan, [rotary(model, p.index) for p in plan.layers])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts = [graph(ids[:, a:b], mask[:, :b], positions[:, a:b], cache, slice(None)) for a, b in pairwise(cuts)]
    return torch.cat(parts, 1)


def both(
    name: str, cuts: list[int], pads: int = 0, dtype: torch.dtype = torch.float32, **over: Any
) -> tuple[Tensor, Tensor]:
    """Logits of the real tokens, `[n, vocabulary]`, from the original and from ours."""
    ids, mask = tiny_ids(2, TOKENS), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :pads] = 0
    with torch.no_grad():
        expected = original(tiny_model(name, **over).to(dtype), ids, mask, cuts)
        got = compiled(tiny_model(name, **over).to(dtype), ids, mask, cuts)
    return expected[mask.bool()], got[mask.bool()]


@pytest.mark.parametrize("cuts", [DECODE, CHUNKED], ids=["decode", "chunked"])
@pytest.mark.parametrize("pads", [0, 9], ids=["full", "left-padded"])
def test_same_logits(architecture: str, cuts: list[int], pads: int) -> None:
    expected, got = both(architecture, cuts, pads)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_half_precision_stays_half_precision(name: str) -> None:
    """olmo2 rotates in float32: without the cast back, keys would be promoted."""
    expected, got = both(name, DECODE, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got - expected).float().pow(2).mean().sqrt() < 0.02 * expected.float().std()


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {"num_key_value_heads": 1}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ],
)
def test_same_logits_for_variants(name: str, over: dict[str, Any]) -> None:
    expected, got = both(name, DECODE, **over)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
