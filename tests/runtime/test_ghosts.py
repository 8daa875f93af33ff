"""Queries counted in chunks: one pass is passes of any size, batches are their sequences; rotations compose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from contract_table import plan_of
from selecting import compiled, generate, kept, left_padded, prefill, selection
from tiny import ARCHITECTURES, tiny_ids, tiny_model
from torch import Tensor

from kvcompile.adapters.architectures import describe
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.graph.ops import rope
from kvcompile.plan.selection import Needs, Schedule
from kvcompile.policies.ghost import GhostReplay
from kvcompile.runtime.cache import Step
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.positions import rotation
from kvcompile.stores.encoded.hadamard import turn_basis

LATE = Schedule(between_chunks=False)


@dataclass(frozen=True)
class Watching(GhostReplay):
    """Remembers what it was shown, and what came of it."""

    shown: ClassVar[list[tuple[int, list[int]]]] = []
    scores: ClassVar[dict[int, list[Tensor]]] = {}

    def observe(self, seen: Observation) -> Tensor:
        self.shown.append((seen.layer, seen.query_positions.tolist()))
        return super().observe(seen)

    def score(self, seen: Observation) -> Tensor:
        scores = super().score(seen)
        self.scores.setdefault(seen.layer, []).append(scores)
        return scores


def watching(chunk: int = 16, band: int = 3) -> Watching:
    Watching.shown.clear()
    Watching.scores.clear()
    return Watching(9, chunk, band, 2)


def counted(layer: int = 1) -> list[list[int]]:
    """Positions of the queries that each observation of a layer counted, but where there were none."""
    return [positions for index, positions in Watching.shown if index == layer and positions]


@pytest.mark.parametrize("chunk", [1, 7, 24])
@pytest.mark.parametrize("name", ["llama", "gemma2", "smollm3", "gpt_oss"])
@pytest.mark.parametrize("together", [0, 16])
def test_one_pass_is_passes_of_any_size(name: str, chunk: int, together: int) -> None:
    """gemma2 and gpt_oss slide, in smollm3 some layers have no rotary positions."""
    ids = tiny_ids(1, 59)
    whole = selection(watching(together), 0.5)
    prefill(compiled(whole, name), ids)
    expected = {i: s[-1] for i, s in Watching.scores.items()}
    prefill(compiled(selection(watching(together), 0.5, schedule=LATE), name, chunk=chunk), ids)
    assert set(Watching.scores) == set(expected)
    for i, scores in Watching.scores.items():
        torch.testing.assert_close(scores[-1], expected[i], rtol=1e-3, atol=1e-7)


def test_queries_of_an_unfinished_chunk_wait_and_all_are_counted_once() -> None:
    cache = prefill(compiled(selection(watching(), 0.5, schedule=LATE), chunk=7), tiny_ids(1, 45))
    assert counted() == [[*range(16)], [*range(16, 32)], [*range(32, 45)]]
    assert not any(layer.history.segments for layer in cache.layers)


def test_no_more_queries_wait_than_a_chunk_has() -> None:
    model = compiled(selection(watching(), 0.5, schedule=LATE), chunk=40)
    held = list[int]()
    model.kvcompile.graph.register_forward_hook(
        lambda graph, args, out: held.append(sum(s.queries.shape[2] for s in args[3].layers[2].history.segments))
    )
    prefill(model, tiny_ids(1, 100))
    assert held[:2] == [40 % 16, 80 % 16]


def test_a_selection_closes_a_chunk_and_the_rest_of_it_is_one_of_its_own() -> None:
    prefill(compiled(selection(watching(), 0.5), chunk=20), tiny_ids(1, 50))
    assert counted() == [[*range(20)], [*range(20, 40)], [*range(40, 50)]]


def test_decoded_tokens_are_counted_where_a_selection_is_due() -> None:
    score = watching()
    model = compiled(selection(score, 12, schedule=Schedule(decode_every=5)))
    cache = generate(model, tiny_ids(1, 21), new=12).past_key_values
    assert counted() == [[*range(21)], [*range(21, 26)], [*range(26, 31)]]
    assert all(len(row) == 13 for layer in range(4) for row in kept(cache, layer))


def test_a_second_prompt_goes_on_where_the_first_ended() -> None:
    model, ids = compiled(selection(watching(), 12)), tiny_ids(1, 50)
    cache = prefill(model, ids[:, :21])
    prefill(model, ids[:, 21:], cache=cache)
    assert counted() == [[*range(21)], [*range(21, 50)]]


@pytest.mark.parametrize("chunk", [0, 6, 25])
def test_a_padded_batch_is_its_sequences(chunk: int) -> None:
    pads = 0, 9, 22
    ids, mask = left_padded(43, *pads)
    model = compiled(selection(watching(), 0.4, schedule=LATE), chunk=chunk)
    cache = prefill(model, ids, mask)
    together = {i: list(s) for i, s in Watching.scores.items()}
    for b, pad in enumerate(pads):
        Watching.scores.clear()
        alone = prefill(model, ids[b : b + 1, pad:])
        for i, scores in Watching.scores.items():
            n = 43 - pad
            torch.testing.assert_close(together[i][b][:, :n], scores[-1][:, :n], rtol=1e-3, atol=1e-7)
            assert kept(cache, i)[2 * b : 2 * b + 2] == kept(alone, i)


def test_chosen_sequences_keep_what_waits() -> None:
    """Beams are reordered between passes: each takes its unfinished chunk along."""
    model = compiled(selection(watching(), 0.5, schedule=LATE))
    ids, mask = left_padded(40, 0, 3)
    cache = model.new_cache()
    cache.chunk(prompting=True, last=False, coming=[4, 4])
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model.kvcompile.graph(ids, mask, at, cache, slice(None))
    assert cache.layers[0].history.pending == [8, 5]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].history.pending == [5, 8]


@pytest.mark.parametrize("stored", [False, True], ids=["plain", "hadamard"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rotations_compose(name: str, stored: bool) -> None:
    """Turned at a position and then on by a shift is turned at the position further on: partial and proportional
    rotary, YaRN's amplitude, and layers without positions too.
    """
    model = compiled(None, name)
    cache = model.new_cache()
    plan = model.kvcompile.plan.map(lambda p: replace(p, storage=replace(p.storage, rotated=stored)))
    step = Step(cache, torch.arange(3).unsqueeze(0), None, prefill=True, last=True)
    states = torch.randn(1, 2, 3, plan.layers[0].head_dim, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 5, 31])
    for p, rotary in zip(plan.layers, cache.rotaries, strict=True):

        def turned(at: Tensor, rotary: Any = rotary) -> Tensor:
            cos, sin = rotary(at)
            states_there = rope(states.clone(), cos.unsqueeze(0), sin.unsqueeze(0))
            return turn_basis(states_there) if stored else states_there

        torch.testing.assert_close(
            turned(positions) @ rotation(step, p, 40), turned(positions + 40), atol=2e-5, rtol=1e-4
        )
        if not p.rotates:
            torch.testing.assert_close(rotation(step, p, 40), torch.eye(p.head_dim), atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"chunk": 4}, {"chunk": None, "carries": True, "queries": 3}], ids=str)
def test_chunks_that_no_score_could_count_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(KvcompileError, match="Needs: "):
        Needs(**wrong)


def test_latents_are_refused_before_anything_is_converted() -> None:
    with pytest.raises(KvcompileError, match="ghost: layer 0: queries that are turned on must meet keys"):
        plan_of({"mla": {}, "ghost": {}})


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}], ids=str)
def test_angles_that_depend_on_the_length_are_refused(rope: dict[str, Any]) -> None:
    model = tiny_model("llama", rope_parameters=rope)
    plan = describe(model.config).map(lambda p: replace(p, selection=selection(GhostReplay(9, 16, 3, 2))))
    with pytest.raises(KvcompileError, match=r"rotary angles that no prompt changes.*'dynamic'"):
        compile_plan(model, plan)
    still = describe(model.config).map(lambda p: replace(p, selection=selection(GhostReplay(0, 16, 3, 2))))
    compile_plan(model, still)  # a look that turns nothing
