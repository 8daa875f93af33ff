"""What transformers' users ask of a model and its cache: the answers are the uncompiled model's, or one clear line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_ids, tiny_model, tiny_tokenizer
from torch import Tensor

import kvcompile
from kvcompile.errors import KvcompileError

IDS = tiny_ids(1, 40)
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
APPENDING = ["", "paged", "offload", "cla"]


def ours(policy: str = "", **over: Any) -> Any:
    """A compiled tiny llama of its own."""
    return kvcompile.compile(tiny_model(**over), overrides=[f"policy=[{policy}]", "kernels=sdpa"])


def generate(model: Any, **options: Any) -> Tensor:
    return model.generate(IDS, **{**GREEDY, **options})  # type: ignore[no-any-return]


def test_stop_strings() -> None:
    """`generate` hands its tokenizer on to the model's forward."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.add_tokens(["abcdef"])  # transformers looks for stop strings behind this word
    stop = tokenizer.decode(generate(model)[0, 44])
    expected = generate(model, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < 50
    assert torch.equal(generate(ours(), stop_strings=[stop], tokenizer=tokenizer), expected)


@pytest.mark.parametrize("how", ["argument", "config"])
def test_tuples_in_place_of_an_output(how: str) -> None:
    model = ours()
    model.config.return_dict = how != "config"
    with torch.no_grad():
        expected = tiny_model()(IDS, labels=IDS, return_dict=False)
        got = model(IDS, labels=IDS, **({"return_dict": False} if how == "argument" else {}))
    assert isinstance(got, tuple)
    assert len(got) == len(expected) == 3
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_config_without_cache() -> None:
    model = ours("knorm")
    model.config.use_cache = False
    with torch.no_grad():
        assert model(IDS).past_key_values is None
        assert model(IDS, use_cache=True).past_key_values is not None
    assert torch.equal(generate(model, use_cache=False), generate(tiny_model()))


@pytest.mark.parametrize("assistant", ["prompt lookup", "a smaller model", "a compiled one"])
@pytest.mark.parametrize("policy", APPENDING)
def test_assisted_decoding_where_the_cache_only_grows(policy: str, assistant: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "a smaller model": {"assistant_model": tiny_model(num_hidden_layers=2)},
        "a compiled one": {"assistant_model": ours(policy, num_hidden_layers=2)},
    }
    model = ours(policy)
    assert torch.equal(generate(model, **options[assistant]), generate(model))


@pytest.mark.parametrize("policy", ["knorm", "int8"])
def test_assisted_decoding_is_refused_where_it_cannot_be_exact(policy: str) -> None:
    with pytest.raises(KvcompileError, match=r"takes back tokens.*assisted_generation"):
        generate(ours(policy), prompt_lookup_num_tokens=3)
    with pytest.raises(KvcompileError, match=r"takes back tokens.*got an assistant model"):
        generate(tiny_model(), assistant_model=ours(policy))


@pytest.mark.parametrize("policy", ["", "paged", "offload", "knorm", "int8"])
def test_keys_and_values_of_a_layer_are_tensors(policy: str) -> None:
    """As transformers' cache gives them, where every row holds the same number of tokens."""
    model = ours(policy)
    assert model.new_cache().layers[0].keys is None
    with torch.no_grad():
        cache, expected = (m(IDS.expand(2, -1)).past_key_values for m in (model, tiny_model()))
    for layer, true in zip(cache.layers, expected.layers, strict=True):
        count = layer.held.lengths[0]
        assert layer.keys.shape == layer.values.shape == (2, 2, count, 16)
        if policy == "knorm":
            at = torch.stack([p.long() for _, _, p in layer.held.rows()]).view(2, 2, count, 1).expand(-1, -1, -1, 16)
            true.keys, true.values = true.keys.gather(2, at), true.values.gather(2, at)
        tolerance = 0.05 if policy == "int8" else 1e-5
        torch.testing.assert_close(layer.keys, true.keys, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.values, true.values, rtol=tolerance, atol=tolerance)


def test_keys_of_rows_of_several_lengths_are_refused() -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        cache = ours()(IDS.expand(2, -1), attention_mask=mask).past_key_values
    with pytest.raises(KvcompileError, match=r"several lengths.*got 31 to 40 tokens.*held\.rows\(\)"):
        _ = cache.layers[2].keys


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = tiny_ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    ids[1, :9], mask[1, :9] = 0, 0
    return ids, mask


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_embeddings(name: str, chunk: int) -> None:
    """Of every layer and of the norm behind the last, for all tokens, wherever padding and chunks cut the prompt."""
    original, (ids, mask) = tiny_model(name), padded()
    overrides = ["policy=[]", "kernels=sdpa", f"prefill_chunk={chunk}"]
    model = kvcompile.compile(tiny_model(name), overrides=overrides)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        true = original(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        embeddings = model.get_input_embeddings()(ids)
        for tokens in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
            out = model(**tokens, attention_mask=mask, output_hidden_states=True, logits_to_keep=3)
            torch.testing.assert_close(out.logits, true.logits[:, -3:], rtol=1e-4, atol=1e-4)
            for got, expected in zip(out.hidden_states, true.hidden_states, strict=True):
                torch.testing.assert_close(got[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)


def test_generation_from_embeddings() -> None:
    ids, mask = padded()
    models = tiny_model(), ours()
    expected, got = (
        m.generate(inputs_embeds=m.get_input_embeddings()(ids) * 0.9, attention_mask=mask, **GREEDY) for m in models
    )
    assert torch.equal(got, expected)


def test_hidden_states_of_a_generation() -> None:
    options: dict[str, Any] = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected, got = (m.generate(IDS, **GREEDY, **options).hidden_states for m in (tiny_model(), ours()))
    assert len(got) == len(expected) == 10
    for mine, theirs in zip(got, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_reach_embeddings() -> None:
    """What prompt tuning trains."""
    gradients = []
    for model in (tiny_model(), ours("h2o")):
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeddings, labels=IDS).loss.backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
