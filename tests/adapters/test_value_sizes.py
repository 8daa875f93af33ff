"""Layers whose values have other sizes than their keys (mimo_v2_flash): bytes are those of both, in every form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import family_config, family_model
from tiny import tiny_ids, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe

KEY, VALUE, TOKENS = 24, 16, 40


def compiled(*overrides: str, kernels: str = "sdpa") -> Any:
    model = family_model("mimo_v2_flash", 64)
    return kvcompile.compile(model, tokenizer=tiny_tokenizer(), overrides=[f"kernels={kernels}", *overrides])


def test_heads_and_sinks_by_layer() -> None:
    """Layers that slide have twice the KV heads, and alone have sinks."""
    slides, full = describe(family_config("mimo_v2_flash")).layers
    assert (slides.kv_heads, slides.sink, slides.sliding_window) == (2, True, 16)
    assert (full.kv_heads, full.sink, full.sliding_window) == (1, False, None)
    assert {(p.key_dim, p.value_dim, p.rotary) for p in (slides, full)} == {(KEY, VALUE, 8)}


def test_bytes_are_those_of_a_key_and_a_value() -> None:
    with torch.no_grad():
        cache = compiled("policy=[]")(tiny_ids(1, TOKENS)).past_key_values
    slides, full = (layer.held.nbytes() for layer in cache.layers)
    assert (slides, full) == (2 * TOKENS * (KEY + VALUE) * 4, TOKENS * (KEY + VALUE) * 4)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    "stack",
    [
        ["policy=[]"],
        ["policy=[h2o]", "budget=20"],
        ["policy=[snapkv,kivi]", "budget=20", "stack.snapkv.window=8", "stack.kivi.group=8", "stack.kivi.residual=8"],
        ["policy=[int8,paged]", "stack.int8.residual=4"],
        ["policy=[expected_attention]", "budget=20"],
        ["policy=[kvzip]", "budget=20"],
        ["policy=[quest]", "stack.quest.skip_layers=[]"],
        ["policy=[tiers]", "stack.tiers.budget=20", "stack.tiers.recent=8", "stack.tiers.skip_layers=[0]"],
    ],
    ids=lambda stack: stack[0],
)
def test_every_backend_and_store(stack: list[str], kernels: str) -> None:
    """A prompt, its bytes as planned, and a token behind it, as the library has them up to a step of codes."""
    ids, outs = tiny_ids(2, TOKENS), []
    for backend in ("sdpa", kernels):
        model = compiled(*stack, kernels=backend)
        with torch.no_grad():
            cache = model(ids).past_key_values
            assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(2, TOKENS))
            outs.append(model(ids[:, :1], past_key_values=cache).logits)
    torch.testing.assert_close(*outs, rtol=1e-3, atol=3e-3)
