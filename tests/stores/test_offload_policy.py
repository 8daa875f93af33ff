"""`offload` in a model: the same logits as without it, little on the device, and every move where the graph says."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_table import HEADS, KIVI8, LAYERS, Options, compiled, dense, kept_positions
from offloading import STACKS, offloaded
from test_contract import steps
from tiny import tiny_ids
from torch import Tensor

from kvcompile.artifact import artifact
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove, verify
from kvcompile.models.sharing import shared
from kvcompile.plan.storage import FLUSH
from kvcompile.report import plan_table
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.host import Host

TOKENS, NEW = 40, FLUSH + 2  # far enough to encode while decoding
every = pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)


class Pretended(Host):
    """Host memory beside a CPU that counts what is moved, and sees that every move is a copy.

    A copy that came is watched: once it is parked nothing may keep it alive.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.near_made: list[weakref.ref[Tensor]] = []
        self.went = self.came = 0

    def away(self, x: Tensor) -> Tensor:
        out = super().away(x)
        assert out.data_ptr() != x.data_ptr() or not x.numel()
        self.went += x.numel() * x.element_size()
        return out

    def near(self, x: Tensor) -> Tensor:
        out = super().near(x)
        assert out.data_ptr() != x.data_ptr() or not x.numel()
        self.near_made.append(weakref.ref(out))
        self.came += x.numel() * x.element_size()
        return out

    def left(self) -> int:
        """Copies on the device that are still alive."""
        return sum(ref() is not None for ref in self.near_made)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """The host memory of every model in a test."""
    made = Pretended(torch.device("cpu"))
    monkeypatch.setattr("kvcompile.stores.host.beside", lambda device: made)
    return made


def books(cache: Any) -> int:
    """Bytes of page tables and reference counts: they do not travel."""
    return sum(map(books_of, cache.layers))


def books_of(layer: Any) -> int:
    if layer.store is None:
        return 0
    moving = {id(x) for x in layer.store.buffers()}
    return sum(x.numel() * x.element_size() for x in layer.store.tensors() if id(x) not in moving)


def watch(monkeypatch: pytest.MonkeyPatch, host: Host) -> list[tuple[int, int]]:
    """(layer, bytes resident) at every attention; fails where one reads what lies at home."""
    seen: list[tuple[int, int]] = []
    attend = LayerCache.attend

    def looked(self: LayerCache, queries: torch.Tensor, step: Any, layer: int, *rest: Any) -> torch.Tensor:
        if self.transfer is not None:
            assert not self.transfer.on_host
            assert not any(map(host.holds, self.held.buffers()))
        seen.append((layer, step.cache.resident()))
        return attend(self, queries, step, layer, *rest)

    monkeypatch.setattr(LayerCache, "attend", looked)
    return seen


@pytest.mark.parametrize("chunk", [0, 16])
@every
def test_logits_are_those_of_the_model_that_is_not_offloaded(
    stack: Options, chunk: int, monkeypatch: pytest.MonkeyPatch, host: Pretended
) -> None:
    """To the bit, over prefill, decoding and rows that outgrow their room; attention never reads what is parked."""
    monkeypatch.setattr("kvcompile.runtime.cache.HEADROOM", 8)
    ids = tiny_ids(2, TOKENS + NEW)
    expected, plain = steps(compiled(stack, prefill_chunk=chunk), ids, TOKENS)
    model = offloaded(stack, prefill_chunk=chunk)
    seen = watch(monkeypatch, host)
    got, cache = steps(model, ids, TOKENS)
    assert torch.equal(got, expected)
    assert kept(cache) == kept(plain)
    assert (cache.nbytes(), cache.lengths()) == (plain.nbytes(), plain.lengths())
    assert cache.evictions == plain.evictions
    assert len(seen) >= LAYERS * (NEW + 1)


def kept(cache: Any) -> Any:
    """Positions held by the layers that own a cache."""
    owned = [layer for layer in cache.layers if layer.store is not None]
    return [[positions.tolist() for _, _, positions in layer.held.rows()] for layer in owned]


@pytest.mark.parametrize("architecture", ["gemma2", "mistral", "gpt_neox", "smollm3"])
def test_the_same_on_other_architectures(architecture: str) -> None:
    """Sliding layers are trimmed and offloaded too."""
    ids = tiny_ids(2, TOKENS + NEW)
    expected, _ = steps(compiled({}, architecture), ids, TOKENS)
    got, cache = steps(offloaded({}, architecture), ids, TOKENS)
    assert torch.equal(got, expected)
    assert (cache.resident(), cache.in_host_memory()) == (0, cache.allocated())


@pytest.mark.parametrize("name", ["plain", "adakv, kivi", "zigzag, kivi"])
def test_a_padded_batch_generates_the_same(name: str) -> None:
    """Ragged rows, and beams that reorder what is parked."""
    ids, mask = tiny_ids(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.long)
    mask[1, :13], mask[2, :37] = 0, 0
    for beams in (1, 2):
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": beams}
        out = [
            m.generate(ids, attention_mask=mask, pad_token_id=0, return_dict_in_generate=True, **options)
            for m in (compiled(STACKS[name]), offloaded(STACKS[name]))
        ]
        assert torch.equal(out[0].sequences, out[1].sequences)
        assert kept_positions(out[0].past_key_values) == kept_positions(out[1].past_key_values)


@every
def test_stores_are_parked_between_passes(stack: Options, host: Pretended) -> None:
    """After each pass nothing is resident, nothing of what came is alive, and the totals stay what they are."""
    ids, model = tiny_ids(2, TOKENS + 6), offloaded(stack)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        for t in range(TOKENS, ids.shape[1]):
            model(ids[:, t : t + 1], past_key_values=cache)
            owned = [layer for layer in cache.layers if layer.store is not None]
            assert all(layer.transfer.on_host and layer.transfer.home is None for layer in owned)
            assert (cache.resident(), host.left()) == (books(cache), 0)
            assert cache.in_host_memory() == cache.allocated() - books(cache)
            assert sum(layer.host_bytes_held() for layer in owned) == cache.nbytes()
            assert cache.allocated() == sum(layer.held.allocated() for layer in owned) > cache.nbytes() > 0


@pytest.mark.parametrize("name", ["plain", "snapkv", "kivi", "zigzag", "paged"])
def test_the_device_holds_two_layers_beside_the_resident_ones(
    name: str, monkeypatch: pytest.MonkeyPatch, host: Pretended
) -> None:
    """While layer i attends, i and the next are there, and those that stay."""
    keep, ids = 1, tiny_ids(2, 3 * TOKENS)
    model = offloaded(STACKS[name], fields={"keep": keep})
    seen = watch(monkeypatch, host)
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        seen.clear()
        model(ids[:, TOKENS : TOKENS + 1], past_key_values=cache)
    each = [layer.held.allocated() for layer in cache.layers]
    stay = cache.resident()
    assert stay == each[0] + books(cache) - books_of(cache.layers[0])
    assert [layer.host_bytes_held() for layer in cache.layers] == [0, *(x.held.nbytes() for x in cache.layers[1:])]
    assert [index for index, _ in seen] == list(range(LAYERS))
    # the first layer's attention finds the second on its way; the last finds itself
    slack = max(2 * (max(each) - min(each)), max(each) // 16)  # room and tables that grew meanwhile, ends of rows
    for index, resident in seen:
        flying = [i for i in (max(index, keep), index + 1) if keep <= i < LAYERS] if index >= keep else [keep]
        assert abs(resident - stay - sum(each[i] for i in flying)) <= slack
    assert max(resident for _, resident in seen) < cache.allocated()


@pytest.mark.parametrize("name", ["plain", "paged"])
def test_only_what_is_new_goes_back_while_nothing_is_dropped(name: str, host: Pretended) -> None:
    """A decoded token costs the way to the device; back go its own keys and values, or the pages they lie in."""
    model = offloaded(STACKS[name])
    with torch.no_grad():
        cache = model(tiny_ids(2, TOKENS)).past_key_values
        went, came = host.went, host.came
        model(tiny_ids(2, 1), past_key_values=cache)
    assert went >= cache.nbytes() * TOKENS // (TOKENS + 1)
    assert came == 0, "an empty cache has nothing to bring"
    assert host.went == went, "no store is sent back as a whole"
    assert cache.nbytes() <= host.came <= cache.allocated()
    assert cache.lengths() == [[TOKENS + 1] * 2 * HEADS] * LAYERS


@pytest.mark.parametrize("name", ["plain", "kivi", "paged", "adakv, paged"])
def test_forks_and_resets_of_parked_stores(name: str) -> None:
    """Two continuations in turns, of one prompt: what one writes the other never sees, wherever pages lie."""
    ids, model = tiny_ids(1, TOKENS + 8), offloaded(STACKS[name])
    other, expected = tiny_ids(1, 9)[:, 1:], compiled(STACKS[name])
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        fork, plain = cache.fork(), expected(ids[:, :TOKENS]).past_key_values
        assert (fork.resident(), fork.in_host_memory()) == (cache.resident(), cache.in_host_memory())
        plain_fork = plain.fork()
        for t in range(8):
            for mine, theirs, tokens in ((cache, plain, ids[:, TOKENS:]), (fork, plain_fork, other)):
                got = model(tokens[:, t : t + 1], past_key_values=mine).logits
                assert torch.equal(got, expected(tokens[:, t : t + 1], past_key_values=theirs).logits)
            assert cache.resident() == books(cache)
        del fork
        cache.reset()
        assert cache.resident() == cache.allocated() == cache.in_host_memory() == 0
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["plain", "paged"])
def test_tokens_of_parked_stores_are_taken_back(name: str) -> None:
    ids, model = tiny_ids(1, TOKENS + 8), offloaded(STACKS[name])
    with torch.no_grad():
        cache = model(ids[:, :TOKENS]).past_key_values
        first = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(TOKENS, TOKENS + 8)]
        cache.crop(-3)
        again = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(TOKENS + 5, TOKENS + 8)]
    assert torch.equal(torch.cat(first[5:]), torch.cat(again))


def test_a_session_goes_on_in_the_same_parked_cache() -> None:
    """Two turns with one cache are the turns of the model that is not offloaded."""
    ids, stack = tiny_ids(1, TOKENS), STACKS["adakv, kivi"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    said = []
    for model in (compiled(stack), offloaded(stack)):
        cache, text = model.new_cache(), ids
        for turn in range(2):
            text = torch.cat((text, tiny_ids(1, 5 + turn)), 1) if turn else text
            text = model.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **options)
        said.append((text, kept_positions(cache)))
    assert torch.equal(said[0][0], said[1][0])
    assert said[0][1] == said[1][1]


def test_an_artifact_comes_back_offloaded(tmp_path: Path) -> None:
    """Plan and logits to the bit."""
    ids, config = tiny_ids(1, TOKENS + NEW), finish(Config(stack={**KIVI8, "offload": {"keep": 1}}))
    model = assemble(shared(dense()), config)
    loaded = artifact.load(artifact.save(model, tmp_path / "artifact"))
    assert loaded.kvcompile.plan == model.kvcompile.plan
    assert [p.storage.offload for p in loaded.kvcompile.plan.layers] == [False, True, True, True]
    (expected, _), (got, cache) = (steps(m, ids, TOKENS) for m in (model, loaded))
    assert torch.equal(got, expected)
    assert 0 < cache.resident() == cache.layers[0].held.allocated()
    text = (tmp_path / "artifact/graph.txt").read_text()
    assert all(f"kvcompile_graph_ops_{op}" in text or f"{op}(" in text for op in ("prefetch", "fetch", "to_host"))
    assert '"offload": true' in (tmp_path / "artifact/plan.json").read_text()


@pytest.mark.parametrize("name", ["plain", "adakv, kivi", "paged"])
def test_bytes_on_device_and_host_are_the_planned_ones(name: str) -> None:
    """And a layer that is not where the plan says is an error."""
    model = offloaded(STACKS[name], fields={"keep": 1})
    rows, _ = prove(model, tiny_ids(1, TOKENS))
    assert [r.host_bytes for r in rows] == [0, *(r.bytes for r in rows[1:])]
    planned = model.kvcompile.plan.bytes(1, TOKENS)
    assert [r.host for r in planned] == [0, *(r.bytes for r in planned[1:])]
    assert plan_table.places(model.kvcompile.plan, 1, TOKENS) == (
        planned[0].bytes,
        sum(r.bytes for r in planned[1:]),
        2 * planned[1].bytes,
    )
    with pytest.raises(KvcompileError, match="layer 1 must hold in host memory the bytes that are offloaded"):
        verify([rows[0], replace(rows[1], host_bytes=0), *rows[2:]])
    with pytest.raises(KvcompileError, match="layer 0 must hold in host memory the bytes that are offloaded"):
        verify([replace(rows[0], host_bytes=rows[0].bytes), *rows[1:]])
