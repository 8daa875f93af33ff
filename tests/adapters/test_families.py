"""Every causal-LM type of transformers is compiled, exactly, or refused with its reason: the contract of a family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, VARIANTS, family_config, family_model
from tiny import tiny_ids
from torch import Tensor
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvcompile
from kvcompile.adapters.architectures import architecture, describe
from kvcompile.adapters.around import AROUND
from kvcompile.adapters.built_in import BUILT_IN
from kvcompile.adapters.refused import REFUSED
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.stack import apply_stack, build_stack

TOKENS = 40
FAMILIES = sorted({*BUILT_IN, *VARIANTS})
WIDE = 64  # a window that nothing leaves
STREAMING = {"streaming": {"budget": 10, "sinks": 2}}  # the same tokens in all heads
SNAPKV = {"snapkv": {"budget": 10, "window": 4, "kernel": 1, "sinks": 0}}  # each head its own
PADDING_COUNTS = ("llama4_text",)  # in transformers, as tokens do
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(name: str, stack: dict[str, dict[str, Any]], window: int = WIDE) -> Any:
    model = family_model(name, window)
    return compile_plan(model, apply_stack(describe(model.config), build_stack(list(stack), stack)), "sdpa")


def logits(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """Of the real tokens, `[n, vocabulary]`, read in the pieces that `cuts` say."""
    cache, pieces = None, []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for a, b in pairwise(cuts):
        told = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        out = model(ids[:, a:b], past_key_values=cache, use_cache=True, **told)
        cache = out.past_key_values
        pieces.append(out.logits)
    return torch.cat(pieces, 1)[mask.bool()]


def fall_with_distance(original: Any, plan: Any, cache: Any, token: int) -> None:
    """Have an original with ALiBi meet what is left in its cache, and a token behind it, at true positions."""
    attentions = architecture(plan.architecture).attentions(original)
    for attention, p, held in zip(attentions, plan.layers, cache.layers, strict=True):
        if p.alibi:
            places = torch.stack([positions for _, _, positions in held.held.rows()]).expand(len(p.alibi), -1)
            places = torch.cat((places, places.new_full((len(places), 1), token)), 1)
            slopes, names = torch.tensor(p.alibi)[:, None, None], ("alibi", "position_bias")
            bias = slopes * (places - token)[:, None]
            if p.alibi_rounded:  # falcon's lies in its mask
                products = (slopes / p.scale).bfloat16() * places[:, None].bfloat16()
                bias, names = p.scale * products[None].float(), ("attention_mask",)

            def met(module: Any, args: Any, kwargs: Any, bias: Tensor = bias, names: Any = names) -> Any:
                return args, {k: bias if k in names else v for k, v in kwargs.items()}

            attention.register_forward_pre_hook(met, with_kwargs=True)


def grow_with_position(original: Any, token: int) -> None:
    """Have queries of an original that grow with their position grow by the true one, whatever its cache holds."""
    for module in original.modules():
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            factor = 1 + module.attn_scale * math.log1p((token + 1) // module.floor_scale)
            module.attn_temperature_tuning = False
            module.q_proj.register_forward_hook(lambda module, args, out, factor=factor: out * factor)


def alone(model: Any, ids: Tensor, mask: Tensor, cuts: list[int]) -> Tensor:
    """What `logits` gives, of each sequence without the others and its padding."""
    pads = [int((row == 0).sum()) for row in mask]
    cut = [[max(0, at - n) for at in cuts] for n in pads]
    return torch.cat([logits(model, ids[b : b + 1, n:], mask[b : b + 1, n:], cut[b]) for b, n in enumerate(pads)])


def equal(got: Tensor, expected: Tensor) -> None:
    """Up to rounding: of logits as large as `expected` are."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5 * float(expected.std()))


def test_every_type_is_compiled_or_refused() -> None:
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(BUILT_IN) & set(REFUSED)
    assert not set(AROUND) & {*BUILT_IN, *REFUSED}
    assert known <= {*BUILT_IN, *REFUSED, *AROUND}, (
        "a type of transformers is neither compiled nor refused with its reason"
    )
    assert set(REFUSED) <= known
    assert set(TINY) <= set(BUILT_IN)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_type_says_why(name: str) -> None:
    with pytest.raises(KvcompileError) as caught:
        architecture(name)
    assert REFUSED[name] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_dropped_is_the_same_model(name: str) -> None:
    """A prompt and three decoded tokens, whole and left-padded; then beams, and a second turn on one cache."""
    original, model, ids = family_model(name), compiled(name, {}, window=16), tiny_ids(2, TOKENS)
    for pads in (0, 9):
        mask = torch.ones_like(ids)
        mask[0, :pads] = 0
        cuts = [0, TOKENS - 3, TOKENS - 2, TOKENS - 1, TOKENS]
        reference = alone if name.startswith(PADDING_COUNTS) else logits
        equal(logits(model, ids, mask, cuts), reference(original, ids, mask, cuts))
    prompt = ids[:1, :24]
    beams = {**GREEDY, "num_beams": 2, "max_new_tokens": 3}
    assert torch.equal(model.generate(prompt, **beams), original.generate(prompt, **beams))
    cache = model.new_cache()
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=2, **GREEDY)
    turn = torch.cat((first, ids[1:, :5]), 1)
    second = model.generate(turn, past_key_values=cache, max_new_tokens=2, **GREEDY)
    assert torch.equal(second, original.generate(turn, max_new_tokens=2, **GREEDY))


@pytest.mark.parametrize("stack", [STREAMING, SNAPKV], ids=["uniform", "per head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_is_what_is_attended_to(name: str, stack: dict[str, dict[str, Any]]) -> None:
    """After a selection the next token is that of the original model with the same entries in its own cache."""
    original, model, ids = family_model(name, WIDE), compiled(name, stack), tiny_ids(1, TOKENS)
    prompt, token = ids[:, :-1], ids[:, -1:]
    plan = model.kvcompile.plan
    # without a config, sliding layers of this cache keep all
    ours, theirs = model(prompt).past_key_values, DynamicCache(config=original.config if plan.state_bytes else None)
    original(prompt, past_key_values=theirs)
    for p in plan.owners:
        assert tuple(ours.lengths()[p.index]) == plan.kept(p.index, prompt.shape[1])
    assert ours.nbytes() == sum(row.bytes for row in plan.bytes(1, prompt.shape[1]))
    attending = architecture(plan.architecture).attending(original.config)
    for p in plan.owners:
        layer, held = theirs.layers[attending[p.index]], ours.layers[p.index].held
        places = torch.stack([positions for _, _, positions in held.rows()])
        places = places.repeat_interleave(layer.keys.shape[1] // len(places), 0)[None, :, :, None]
        layer.keys, layer.values = (
            x.gather(2, places.expand(-1, -1, -1, x.shape[3])) for x in (layer.keys, layer.values)
        )
    at = torch.tensor([[prompt.shape[1]]])
    fall_with_distance(original, plan, ours, prompt.shape[1])
    grow_with_position(original, prompt.shape[1])
    expected = original(token, past_key_values=theirs, position_ids=at).logits
    equal(model(token, past_key_values=ours).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_stored_in_8_bits_and_saved(name: str, tmp_path: Path) -> None:
    """Logits stay near, bytes are those of the plan, and what is loaded says the same to the bit."""
    original, model, ids = family_model(name, WIDE, full=True), family_model(name, WIDE, full=True), tiny_ids(1, TOKENS)
    model = kvcompile.compile(model, overrides=["policy=[int8]", "stack.int8.residual=4", "kernels=sdpa"])
    prompt, token = ids[:, :-1], ids[:, -1:]
    cache = model(prompt).past_key_values
    assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, prompt.shape[1]))
    got, expected = model(token, past_key_values=cache).logits, original(ids).logits[:, -1:]
    assert 0 < (got - expected).square().mean().sqrt() < 0.1 * expected.std()
    kvcompile.save(model, tmp_path / "artifact")
    loaded = kvcompile.load(tmp_path / "artifact")
    assert torch.equal(loaded(token, past_key_values=loaded(prompt).past_key_values).logits, got)


@pytest.mark.parametrize("name", [name for name in FAMILIES if describe(family_config(name)).state_bytes])
def test_states_are_counted_moved_and_copied(name: str) -> None:
    """What layers without keys and values hold is in the plan, moves with its sequence, is each fork's own, goes."""
    model, ids = compiled(name, {}), tiny_ids(2, TOKENS)
    cache = model(ids[:, :-1]).past_key_values
    assert cache.state_bytes() == 2 * model.kvcompile.plan.state_bytes > 0
    assert cache.allocated() > cache.nbytes() + cache.state_bytes()
    assert not cache.is_croppable
    expected = model(ids[:, -1:], past_key_values=cache.fork()).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    equal(model(ids.flip(0)[:, -1:], past_key_values=cache).logits.flip(0), expected)
    cache.reset()
    model(ids[:, :-1], past_key_values=cache)
    equal(model(ids[:, -1:], past_key_values=cache).logits, expected)
    half = compiled(name, {}).to(torch.bfloat16)
    measured = half(ids[:, :9]).past_key_values.state_bytes()
    assert measured == 2 * describe(half.config, "bfloat16").state_bytes


@pytest.mark.parametrize("name", [name for name in FAMILIES if describe(family_config(name)).state_bytes])
def test_several_tokens_go_on_from_the_states(name: str) -> None:
    """Also where transformers' own layers would begin anew in such a pass; padding among them is refused there."""
    model, ids = compiled(name, {}), tiny_ids(2, TOKENS)
    cache = model(ids[:, :30]).past_key_values
    expected = family_model(name, WIDE)(ids).logits[:, 30:]
    got = model(ids[:, 30:], past_key_values=cache).logits  # summed in another order than a whole prompt
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * float(expected.std()))
    if model.kvcompile.restarts:
        mask = torch.ones(2, TOKENS + 2, dtype=torch.long)
        mask[0, -2] = 0
        with pytest.raises(KvcompileError, match="without padding"):
            model(ids[:, :2], past_key_values=cache, attention_mask=mask)


@pytest.mark.parametrize(
    ("option", "says"), [("prefill_chunk=8", "at once"), ("policy=[kvzip]", "once, token by token")]
)
def test_what_would_read_a_text_again_or_in_pieces_is_refused_with_states(option: str, says: str) -> None:
    with pytest.raises(KvcompileError, match=says):
        kvcompile.compile(family_model("lfm2"), overrides=["policy=[]", option, "kernels=sdpa"])


def test_tiny_configs_use_what_is_special() -> None:
    """Layers that slide, turn in part or not at all, soft-caps, sinks and norms all occur."""
    plans = [describe(family_config(name)) for name in FAMILIES]
    layers = [p for plan in plans for p in plan.layers]
    for fact in ("sliding_window", "softcap", "sink", "key_norm"):
        assert any(getattr(p, fact) for p in layers)
    assert any(not p.rotates for p in layers)
    assert any(p.rotates and p.rotary < p.head_dim for p in layers)


@pytest.mark.parametrize("name", ["gpt2", "opt", "dbrx", "llama4_text", "longcat_flash"])
def test_hidden_states_whatever_layers_are_called(name: str) -> None:
    ids = tiny_ids(1, 9)
    got = compiled(name, {})(ids, output_hidden_states=True).hidden_states
    for ours, theirs in zip(got, family_model(name, WIDE)(ids, output_hidden_states=True).hidden_states, strict=True):
        equal(ours, theirs)
