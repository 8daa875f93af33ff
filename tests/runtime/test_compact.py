"""Compact positions: stored keys turned to where they stand among those that stay, as StreamingLLM has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from selecting import compiled, generate, left_padded, prefill, selection
from tiny import rotary, tiny_ids, tiny_model
from torch import Tensor

from kvcompile.plan.selection import Schedule, Score
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.positions import turn

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("name", "over"),
    [("llama", {}), ("llama", {"rope_parameters": YARN}), ("phi3", {}), ("gpt_neox", {}), ("smollm3", {})],
    ids=["llama", "llama-yarn", "phi3", "gpt_neox", "smollm3"],
)
def test_turning_a_key_is_rotating_it_at_the_new_position(name: str, over: dict[str, Any]) -> None:
    """Of a part of the channels, or with an amplitude (yarn), just as well."""
    from kvcompile.graph.ops import rope

    model = tiny_model(name, **over)
    turns = rotary(model, 0)
    keys = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    old, new = torch.arange(12) * 9 + 5, torch.arange(12)

    def at(positions: Tensor) -> Tensor:
        cos, sin = turns(positions)
        return rope(keys[None, None], cos[None], sin[None])[0, 0]

    torch.testing.assert_close(turn(at(old), old, new, turns), at(new), atol=1e-5, rtol=1e-5)


def naive_compact(
    original: Any, ids: Tensor, new: int, budget: int, every: int, sinks: int
) -> tuple[list[int], Tensor]:
    """StreamingLLM on transformers: the kept tokens' pre-rotary keys are rotated anew at 0..n-1 before every step."""
    from kvcompile.graph.ops import rope

    turns = rotary(original, 0)

    def rotated(keys: Tensor, positions: Tensor, sign: int) -> Tensor:
        cos, sin = turns(positions)
        return rope(keys, cos[None], sign * sin[None])

    with torch.no_grad():
        out = original(ids, use_cache=True)
        cache, tokens, logits = out.past_key_values, [], []
        held, evict = ids.shape[1], True
        for step in range(new):
            if evict and held > budget:
                index = torch.cat((torch.arange(sinks), torch.arange(held - budget + sinks, held)))
                for layer in cache.layers:
                    bare = rotated(layer.keys, torch.arange(held), -1)[:, :, index]
                    layer.keys, layer.values = rotated(bare, torch.arange(budget), 1), layer.values[:, :, index]
                held = budget
            logits.append(out.logits[:, -1])
            tokens.append(int(out.logits[0, -1].argmax()))
            if step + 1 < new:
                out = original(
                    torch.tensor([tokens[-1:]]),
                    past_key_values=cache,
                    position_ids=torch.tensor([[held]]),
                    attention_mask=torch.ones(1, held + 1),
                )
                held, evict = held + 1, (step + 1) % every == 0
    return tokens, torch.cat(logits)


@dataclass(frozen=True)
class Newest(Score):
    """The newest entries stay."""

    def score(self, seen: Observation) -> Tensor:
        return seen.positions.float()


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_compact_positions_like_a_naive_implementation(name: str) -> None:
    s = selection(Newest(), 10, recent=0, positions="compact", schedule=Schedule(decode_every=3))
    ids = tiny_ids(1, 24)
    tokens, logits = naive_compact(tiny_model(name), ids, 14, budget=10, every=3, sinks=2)
    out = generate(compiled(s, name), ids, new=14, output_logits=True)
    torch.testing.assert_close(torch.cat(out.logits), logits, atol=2e-4, rtol=1e-4)
    assert out.sequences[0, 24:].tolist() == tokens


@pytest.mark.parametrize("chunk", [0, 7])
def test_compact_positions_of_a_batch(chunk: int) -> None:
    s = selection(Newest(), 10, recent=0, positions="compact", schedule=Schedule(decode_every=3))
    model = compiled(s, chunk=chunk)
    ids, mask = left_padded(28, 0, 7, 21)
    together = generate(model, ids, mask)
    for b, pads in enumerate((0, 7, 21)):
        assert torch.equal(generate(model, ids[b : b + 1, pads:]).sequences[0, -10:], together.sequences[b, -10:])


def test_compact_positions_rotate_the_mean_query_alike_in_all_layers() -> None:
    """Layers are compressed one after another; a later one must not see the positions of an earlier one's outcome."""
    rotations: list[Tensor] = []

    @dataclass(frozen=True)
    class Watching(Newest):
        def score(self, seen: Observation) -> Tensor:
            assert seen.mean_rotation is not None
            rotations.append(seen.mean_rotation(4))
            return super().score(seen)

    prefill(compiled(selection(Watching(), 10, positions="compact")), tiny_ids(1, 24))
    assert len(rotations) == 4
    assert all(torch.equal(r, rotations[0]) for r in rotations)
