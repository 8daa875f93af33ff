"""MLA: exact at full rank, absorbed decoding and expanded prefill alike, and a cache of rank + rope numbers a token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import converted, logits, parameters, planned
from tiny import attentions, tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.artifact import artifact
from kvcompile.build import build
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.compiler import assemble
from kvcompile.config.schema import Config
from kvcompile.config.validate import finish
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.proof import prove
from kvcompile.models.sharing import shared
from kvcompile.plan.structure import Latent
from kvcompile.progress import silent
from kvcompile.structure import absorb
from kvcompile.structure.convert import convert
from kvcompile.structure.latent import decompose

FAMILIES = ("llama", "mistral", "qwen2", "phi3", "gpt_neox", "smollm3", "granite", "mixtral", "gemma2", "gpt_oss")
NORMED = ("qwen3", "gemma3_text", "olmo2")
FULL = {"phi3": (16, 48), "gpt_neox": (16, 65)}  # (rope, rank); keys and values of one token have no more than that
TEXT = tiny_ids(1, 300, seed=7)
WEIGHTS: dict[str, Any] = {"factor": "weights", "select": "uniform"}  # needs no text


def model_of(name: str) -> Any:
    """A tiny model; llama with biases, which fold into the latent's."""
    return tiny_model(name, **({"attention_bias": True} if name == "llama" else {}))


def mla(model: Any, text: torch.Tensor | None = TEXT, **options: Any) -> Any:
    return converted(model, {"mla": options}, text)


@torch.no_grad()
def stepped(model: Any, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a prefill, then of one token at a time."""
    out = model(ids[:, :prompt], use_cache=True)
    got = [out.logits]
    for t in range(prompt, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        got.append(out.logits)
    return torch.cat(got, 1)


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("options", [{"mix": True}, {"mix": False, "damp": False}, WEIGHTS], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_full_rank_with_all_positions_is_exact(name: str, options: dict[str, Any]) -> None:
    """Only the basis changes: prefill and absorbed decoding are the original model's."""
    model, ids = model_of(name), tiny_ids(2, 40)
    rope, rank = FULL.get(name, (32, 32))
    got = mla(model, rope=rope, rank=rank, **{"select": "low", **options})
    assert off(stepped(got, ids, 25), logits(model, ids)) < 2e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_prefill_expanded_in_chunks_absorbed_and_by_every_backend(name: str) -> None:
    """A whole prompt is expanded to heads, chunks and the reference backend stay absorbed: the same function."""
    model, ids = model_of(name), tiny_ids(2, 40)
    plan = planned(model, {"mla": {"rope": 8, "rank": 20, **WEIGHTS}})
    copy = shared(model)
    convert(copy, plan)
    expected = stepped(build(shared(copy), plan, "reference"), ids, 30)
    assert off(expected, logits(model, ids)) > 1e-3, "a case that loses something"
    for kernels in ("sdpa", "auto"):
        assert off(stepped(build(shared(copy), plan, kernels), ids, 30), expected) < 1e-5
    chunked = build(shared(copy), replace(plan, prefill_chunk=7))
    assert off(stepped(chunked, ids, 30), expected) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_holds_rank_plus_rope_numbers_and_nothing_else(name: str) -> None:
    rope, rank = 4, 10
    got = mla(model_of(name), rope=rope, rank=rank, **WEIGHTS)
    rows, _ = prove(got, tiny_ids(1, 50))  # raises where plan and cache differ
    for p, row in zip(got.kvcompile.plan.layers, rows, strict=True):
        assert row.bytes == p.span(50) * 14 * 4, "a layer without positions has a longer latent instead"
        assert (row.kv_heads, p.latent.rope) == (1, rope if p.rotates else 0)
        assert row.dense_bytes == p.span(50) * 2 * p.dense_heads * 16 * 4
    cache = got(tiny_ids(2, 50)).past_key_values
    for layer in cache.layers:
        held = layer.held
        assert len(held.tensors()) == 2, "rows and positions"
        assert held.values.untyped_storage().data_ptr() == held.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox"])
def test_parameters_are_those_of_the_projections(name: str) -> None:
    model = model_of(name)
    got, heads = mla(model, rope=4, rank=10, **WEIGHTS), describe(model.config).layers[0].kv_heads
    biased = name != "phi3"
    gone = 2 * heads * 16 * (64 + biased)
    new = 14 * (64 + biased) + heads * 16 * (14 + 10)
    assert parameters(model) - parameters(got) == 4 * (gone - new)


def test_the_fit_to_text_beats_the_weights_alone() -> None:
    """On text of the same kind, at every rank; and both get better with it."""
    model, other = tiny_model("llama"), tiny_ids(4, 60, seed=11)
    lost: dict[str, list[float]] = {"activations": [], "weights": []}
    for factor, rank in product(lost, (16, 32, 40)):
        got = mla(model, rope=16, rank=rank, select="high", mix=False, damp=False, factor=factor)
        lost[factor].append(off(logits(got, other), logits(model, other)))
    assert all(a < w for a, w in zip(lost["activations"], lost["weights"], strict=True))
    assert all(found == sorted(found, reverse=True) for found in lost.values())


def test_what_is_constant_in_the_values_goes_into_the_output() -> None:
    """Values of a large constant and little else: a latent of two numbers does, as long as the output has its bias."""
    model = tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        for attention in attentions(model):
            attention.v_proj.bias.add_(5)
    got, ids = mla(model, rope=32, rank=2, select="low"), tiny_ids(2, 40)
    assert off(logits(got, ids), logits(model, ids)) < 0.3
    with torch.no_grad():
        for new, old in zip(attentions(got), attentions(model), strict=True):
            assert torch.equal(new.o_proj.weight, old.o_proj.weight)
            new.o_proj.bias.copy_(old.o_proj.bias)
    assert off(logits(got, ids), logits(model, ids)) > 0.5


@pytest.mark.parametrize(
    ("name", "factor", "centred"),
    [("llama", "activations", True), ("llama", "weights", False), ("gemma2", "activations", False)],
)
def test_latents_are_centred_where_constants_do_not_matter(name: str, factor: str, centred: bool) -> None:
    """A softmax takes away what is constant in a logit; a soft-cap sees it, and weights alone know of none."""
    plan = planned(tiny_model(name), {"mla": {"factor": factor}})
    assert {p.latent.centred for p in plan.layers} == {centred}


@pytest.mark.parametrize(
    ("select", "rope", "expected"),
    [("high", 6, (0, 0, 1)), ("low", 6, (6, 7, 7)), ("uniform", 6, (0, 0, 4)), ("uniform", 8, (0, 0, 4, 4))],
)
def test_frequencies_are_as_many_as_pairs(select: str, rope: int, expected: tuple[int, ...]) -> None:
    """Two KV heads of 8 frequencies: an odd number of pairs takes one of the last frequency's two."""
    plan = planned(tiny_model(), {"mla": {"rope": rope, "select": select, "factor": "weights"}})
    assert {p.latent.frequencies for p in plan.layers} == {expected}


def test_a_truncated_latent_is_a_model_with_low_rank_values() -> None:
    """With all positions kept only values lose: transformers' own class with W_V = W_UV W_DV says the same."""
    model, ids = tiny_model("llama", attention_bias=True), tiny_ids(2, 40)
    got, stock = mla(model, rope=32, rank=12, select="low"), tiny_model("llama", attention_bias=True)
    with torch.no_grad():
        for new, old in zip(attentions(got), attentions(stock), strict=True):
            down, up = new.latent.down, new.latent.up.weight.flatten(0, 1)
            old.v_proj.weight.copy_(up @ down.weight[32:])
            old.v_proj.bias.copy_(up @ down.bias[32:])
            old.o_proj.bias.copy_(new.o_proj.bias)
    assert off(stepped(got, ids, 30), logits(stock, ids)) < 1e-5


def calibrated(model: Any, **options: Any) -> Any:
    from kvcompile.stack import build_stack

    return build_stack(["mla"], {"mla": options})[0].calibrated(ModelCalibrator(model, tiny_tokenizer(), silent))


def test_calibration_fills_in_ranks_and_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def noted(weights: Any, p: Any, how: Latent, *more: Any) -> Any:
        asked.append(list(how.frequencies))
        return decompose(weights, p, how, *more)

    model = tiny_model()
    monkeypatch.setattr(absorb, "decompose", noted)
    low, high = (calibrated(model, energy=e, rope=12, tokens=64) for e in (0.8, 0.99))
    assert all(1 <= a < b <= 52 for a, b in zip(low.ranks, high.ranks, strict=True))
    for found in low.frequencies:
        assert len(found) == 6
        assert found == sorted(found)
        assert max(found.count(f) for f in found) <= 2, "two KV heads have two components of a frequency"
    assert asked == low.frequencies + high.frequencies, "a rank is that of what these frequencies leave"
    norm = calibrated(model, select="norm", rope=12, tokens=64)
    assert norm.frequencies != low.frequencies
    assert norm.ranks == []
    assert low.calibrated(None) is low


def test_an_energy_is_what_the_plan_says_after_calibration(tmp_path: Path) -> None:
    options = {"energy": 0.9, "tokens": 64}
    model = assemble(shared(tiny_model()), finish(Config(stack={"mla": options})), tiny_tokenizer())
    ranks = [p.latent.rank for p in model.kvcompile.plan.layers]
    assert len(set(ranks)) > 1
    prove(model, tiny_ids(1, 40))
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    assert loaded.kvcompile.plan == model.kvcompile.plan
    with torch.no_grad():
        assert torch.equal(loaded(tiny_ids(2, 30)).logits, model(tiny_ids(2, 30)).logits)
    assert loaded.config.num_key_value_heads == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name: str, tmp_path: Path) -> None:
    options = {"rope": 4, "rank": 12, "tokens": 64}
    config = finish(Config(stack={"mla": options}, kernels="sdpa"))
    model = assemble(shared(model_of(name)), config, tiny_tokenizer())
    loaded = kvcompile.load(artifact.save(model, tmp_path / "artifact"))
    ids = tiny_ids(2, 24)
    assert torch.equal(stepped(loaded, ids, 20), stepped(model, ids, 20))
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert not [n for n in model.state_dict() if ".k_proj" in n or ".v_proj" in n]


def test_the_original_is_not_touched() -> None:
    model = model_of("qwen2")
    before, expected = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    mla(model, rope=8, rank=8, select="high")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_turns_and_beams_and_pages() -> None:
    """Two turns are one; beams with a cache find what beams without find; pages hold the same rows."""
    model, ids = tiny_model(), tiny_ids(2, 36)
    got = mla(model, rope=8, rank=20, **WEIGHTS)
    with torch.no_grad():
        cache = got.new_cache()
        got(ids[:, :20], past_key_values=cache)
        second = got(ids[:, 20:], past_key_values=cache).logits
        torch.testing.assert_close(second, got(ids).logits[:, 20:], atol=1e-4, rtol=1e-4)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
        mask = torch.ones_like(ids)
        beams = got.generate(ids, attention_mask=mask, use_cache=True, **options)
        assert torch.equal(beams, got.generate(ids, attention_mask=mask, use_cache=False, **options))
    paged = converted(model, {"mla": {"rope": 8, "rank": 20, **WEIGHTS}, "paged": {"page": 8}}, kernels="auto")
    assert off(stepped(paged, ids, 30), stepped(got, ids, 30)) < 1e-5
    prove(paged, tiny_ids(1, 40))
    on_host = converted(model, {"mla": {"rope": 8, "rank": 20, **WEIGHTS}, "offload": {}})
    assert torch.equal(stepped(on_host, ids, 30), stepped(got, ids, 30))


@pytest.mark.parametrize(
    "selection",
    [{"expected_attention": {"budget": 12}}, {"streaming": {"budget": 12, "positions": "compact"}}],
    ids=str,
)
def test_selections_where_a_layer_turns_nothing(selection: dict[str, Any]) -> None:
    """Scores and moved rows ask for the rotation of what is cached, also where there is none."""
    frequencies = [[0, 1, 2], [0, 0, 7], [], [3, 3, 4]]
    stack = {"mla": {"rope": 6, "rank": 10, "frequencies": frequencies, "factor": "weights"}, **selection}
    got = converted(tiny_model(), stack, TEXT)
    rows, _ = prove(got, tiny_ids(1, 30))
    assert [row.kept for row in rows] == [[12]] * 4
    assert stepped(got, tiny_ids(2, 30), 25).isfinite().all()


def test_a_fork_of_pages_goes_its_own_way() -> None:
    got = converted(tiny_model(), {"mla": {"rope": 8, "rank": 20, **WEIGHTS}, "paged": {"page": 8}})
    ids = tiny_ids(1, 30)
    with torch.no_grad():
        cache = got(ids[:, :20]).past_key_values
        other = cache.fork()
        got(tiny_ids(1, 5, seed=9), past_key_values=other)
        kept = got(ids[:, 20:], past_key_values=cache).logits
    assert off(kept, stepped(got, ids, 20)[:, 20:]) < 1e-5


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        ({"gqa": {}, "mla": WEIGHTS}, "own keys and values"),
        ({"cla": {}, "mla": WEIGHTS}, "own keys and values"),
        ({"mla": WEIGHTS, "gqa": {}}, "no KV heads to merge.*'gqa' after 'mla'"),
        ({"mla": WEIGHTS, "cla": {}}, "own keys and values"),
        ({"mla": WEIGHTS, "kivi": {}}, "keeps the model's dtype.*'kivi' after 'mla'"),
        ({"mla": WEIGHTS, "int8": {}}, "keeps the model's dtype"),
        ({"mla": WEIGHTS, "rotate": {}}, "keeps the model's dtype"),
        ({"mla": {"rank": 60, "rope": 8, **WEIGHTS}}, "1 to 64 numbers"),
        ({"mla": {"rope": 34, **WEIGHTS}}, "rope must be at most 32"),
        ({"mla": {"rope": 3, **WEIGHTS}}, "rope must be even"),
        ({"mla": {"rank": 8, "energy": 0.5}}, "null where rank is given"),
        ({"mla": {"ranks": [4, 4]}}, "for each of the 4 layers"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(stack: dict[str, Any], message: str) -> None:
    with pytest.raises(KvcompileError, match=message) as told:
        planned(tiny_model(), stack)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", NORMED)
def test_keys_that_are_normed_are_refused(name: str) -> None:
    with pytest.raises(KvcompileError, match="mla: layer 0: keys that are normed"):
        planned(tiny_model(name), {"mla": WEIGHTS})


def test_a_fit_needs_text_and_a_rank_that_there_is() -> None:
    model = tiny_model("gpt_neox")
    with pytest.raises(KvcompileError, match="fitted to text"):
        mla(model, None, rope=8, rank=8, select="high")
    with pytest.raises(KvcompileError, match="rank must be at most 65"):
        mla(model, rope=8, rank=70, select="high")
