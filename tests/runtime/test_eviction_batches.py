"""Selections of a batch: neither batch, padding, chunk, turn nor beam changes what stays or what a score is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from selecting import (
    Above,
    AllAttention,
    Expected,
    Labelled,
    PerHead,
    compiled,
    generate,
    kept,
    left_padded,
    prefill,
    selection,
)
from tiny import rotary, tiny_ids, tiny_model
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.graph.ops import rope
from kvcompile.plan.selection import Budget, Schedule, Selection
from kvcompile.policies.snapkv import WindowAttention
from kvcompile.runtime.observation import Observation

SCORES: dict[str, Callable[[], Selection]] = {
    "window": lambda: selection(WindowAttention(4, 3, "max"), 0.4, schedule=Schedule(decode_every=3)),
    "carried": lambda: selection(AllAttention(), 0.4, schedule=Schedule(decode_every=3)),
    "moments": lambda: selection(Expected(), 0.4, schedule=Schedule(decode_every=3)),
    "heads": lambda: selection(WindowAttention(4), 0.4, allocation=PerHead(), schedule=Schedule(decode_every=3)),
    "layers": lambda: selection(
        WindowAttention(4), 0.4, allocation=PerHead(True), uncertainty=WindowAttention(6), schedule=Schedule(True, 3)
    ),
    "carried-and-unsure": lambda: selection(
        AllAttention(), 0.4, allocation=PerHead(), uncertainty=WindowAttention(6), schedule=Schedule(True, 3)
    ),
    "threshold": lambda: selection(WindowAttention(4), None, allocation=Above(0.03), schedule=Schedule(decode_every=3)),
    "once": lambda: selection(WindowAttention(4), 0.4),
}


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("kind", SCORES)
def test_batch_is_its_sequences_alone(kind: str, chunk: int) -> None:
    """Two turns, evicting during prefill and decode. (Chunks start at the same tokens: pads are whole chunks.)"""
    model = compiled(SCORES[kind](), chunk=chunk)
    pads, later = (0, 7, 14), (14, 0, 7)
    first, mask = left_padded(35, *pads)
    second, more = left_padded(28, *later, seed=1)
    cache = model.new_cache()
    answers = generate(model, first, mask, new=9, past_key_values=cache).sequences
    prefill(model, second, torch.cat((mask, torch.ones(3, 8, dtype=torch.long), more), 1), cache)
    for b in range(3):
        alone = model.new_cache()
        answer = generate(model, first[b : b + 1, pads[b] :], new=9, past_key_values=alone).sequences
        assert torch.equal(answer[0, -9:], answers[b, -9:])
        prefill(model, second[b : b + 1, later[b] :], cache=alone)
        assert alone.seen == cache.seen[b : b + 1]
        for layer in range(4):
            assert kept(alone, layer) == kept(cache, layer)[2 * b : 2 * b + 2]


def test_right_padding_remembers_the_last_real_queries() -> None:
    for kind in ("window", "carried-and-unsure"):
        model = compiled(SCORES[kind]())
        ids, mask = tiny_ids(2, 30), torch.ones(2, 30, dtype=torch.long)
        mask[1, 20:] = 0
        both, alone = prefill(model, ids, mask), prefill(model, ids[1:, :20])
        for layer in range(4):
            assert kept(alone, layer) == kept(both, layer)[2:]


@pytest.mark.parametrize("chunk", [1, 4, 40])
def test_scores_do_not_depend_on_chunks(chunk: int) -> None:
    for kind in ("window", "carried", "moments"):
        s = replace(SCORES[kind](), schedule=Schedule(between_chunks=False))
        whole, pieces = prefill(compiled(s), tiny_ids(2, 30)), prefill(compiled(s, chunk=chunk), tiny_ids(2, 30))
        for layer in range(4):
            assert kept(whole, layer) == kept(pieces, layer)


@pytest.mark.parametrize("pads", [0, 7])
@pytest.mark.parametrize("chunk", [0, 7])
def test_carried_state_follows_its_entries(chunk: int, pads: int) -> None:
    """Through chunks, evictions, decoding and beams: `Labelled` itself checks at every look."""
    ids, mask = left_padded(25, 0, pads)
    s = selection(Labelled(), 0.4, allocation=PerHead(), schedule=Schedule(decode_every=2))
    model = compiled(s, chunk=chunk)
    generate(model, ids, mask, num_beams=3)
    cache = prefill(model, ids, mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    prefill(model, ids[:, -5:], torch.cat((mask, torch.ones(2, 5)), 1)[:, -30:], cache)


def test_beams_take_their_caches_along() -> None:
    """Beam search over a compressed cache equals beam search with the slow reference."""
    ids, mask = left_padded(25, 0, 9)
    outs = [generate(compiled(SCORES["heads"](), kernels=k), ids, mask, num_beams=3) for k in ("sdpa", "reference")]
    assert torch.equal(outs[0].sequences, outs[1].sequences)


@dataclass(frozen=True)
class Recorder(Expected):
    """Keeps the moments it was shown."""

    moments: dict[int, list[Any]] = field(default_factory=dict, compare=False)

    def score(self, seen: Observation) -> Tensor:
        self.moments.setdefault(seen.layer, []).append(seen.moments)
        return super().score(seen)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("chunk", [0, 7])
def test_moments_are_those_of_the_queries_before_rotation(chunk: int, stride: int) -> None:
    """Population mean and covariance of every `stride`-th token from the fifth on (no sinks), without padding."""
    original, recorder = tiny_model(), Recorder(stride)
    queries: list[Tensor] = []
    original.model.layers[2].self_attn.q_proj.register_forward_hook(lambda m, i, out: queries.append(out))
    ids, mask = left_padded(30, 0, 7)
    with torch.no_grad():
        for b, pads in enumerate((0, 7)):
            original(ids[b : b + 1, pads:])
    prefill(compiled(selection(recorder, schedule=Schedule(between_chunks=False)), chunk=chunk), ids, mask)
    for moments, states in zip(recorder.moments[2][-2:], queries, strict=True):
        q = states[0, 4 + -4 % stride :: stride].double().unflatten(-1, (4, 16)).transpose(0, 1)
        assert moments.count == q.shape[1]
        for head in range(4):
            mean, covariance = moments.mean[head // 2, head % 2], moments.covariance[head // 2, head % 2]
            torch.testing.assert_close(mean.double(), q[head].mean(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(covariance.double(), torch.cov(q[head].T, correction=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_the_mean_rotation_is_the_mean_of_rotations(name: str) -> None:
    rotations: list[Tensor] = []

    @dataclass(frozen=True)
    class Watching(Expected):
        def score(self, seen: Observation) -> Tensor:
            assert seen.mean_rotation is not None
            rotations.append(seen.mean_rotation(5))
            return super().score(seen)

    model = compiled(selection(Watching(), 0.5), name)
    prefill(model, tiny_ids(1, 15))
    queries = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary(model, 0)(torch.arange(15, 20))
    expected = rope(queries[:, None].expand(3, 5, 16)[None], cos[None], sin[None])[0].mean(1)
    torch.testing.assert_close(queries @ rotations[0], expected, atol=1e-5, rtol=1e-5)


def test_layers_that_turn_alike_ask_for_their_angles_once_a_pass() -> None:
    """gemma3 has two kinds of layers with angles of their own."""
    asked: list[Tensor] = []
    model = compiled(selection(Expected(), 0.5), "gemma3_text")
    kinds = model.kvcompile.rotaries

    def noting(rotary: Any) -> Any:
        def angles(at: Tensor) -> Any:
            asked.append(at)
            return rotary(at)

        return angles

    wrapped = {id(rotary): noting(rotary) for rotary in kinds}
    model.kvcompile.rotaries = [wrapped[id(rotary)] for rotary in kinds]
    cache = prefill(model, tiny_ids(1, 15))
    assert len(wrapped) == 2
    assert [at.tolist() for at in asked] == [list(range(15, 23))] * 2
    asked.clear()
    prefill(model, tiny_ids(1, 5, seed=1), cache=cache)
    assert [at.tolist() for at in asked] == [list(range(20, 28))] * 2


@pytest.mark.parametrize("kind", ["carried", "moments"])
def test_crop_stops_at_what_a_score_has_summed(kind: str) -> None:
    model = compiled(replace(SCORES[kind](), budget=Budget(400), schedule=Schedule()))
    cache = prefill(model, tiny_ids(1, 12))
    with pytest.raises(KvcompileError, match="cropped"):
        cache.crop(-2)
    with torch.no_grad():
        model(tiny_ids(1, 1), past_key_values=cache)
    cache.crop(-1)
    prefill(model, tiny_ids(1, 3), cache=cache)
    assert cache.seen == [15]
