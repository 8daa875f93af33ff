"""Models of images and text: the text stack is compiled, and with nothing dropped the model is the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from images import BOTH_WAYS, PARTS, QWEN, STATEFUL, image_config, image_inputs, image_model, text_inputs
from transformers import DynamicCache

import kvcompile
from kvcompile.adapters.architectures import architecture
from kvcompile.adapters.around import AROUND
from kvcompile.errors import KvcompileError

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
ALL = sorted({*PARTS, *QWEN})


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(name: str, *settings: str) -> Any:
    return kvcompile.compile(image_model(name), overrides=[*(settings or ["policy=[]"]), "kernels=sdpa"])


def require_same_logits(model: Any, original: Any, inputs: dict[str, Any], apart: float = 1e-5) -> None:
    """Of all real tokens of a prompt."""
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], original(**inputs).logits[real], rtol=apart, atol=apart)


def require_same(name: str, original: Any, inputs: dict[str, Any], chunk: int) -> None:
    """A prompt, the tokens after it (in a batch: by beams), of a compiled model that drops nothing; and in chunks."""
    model = compiled(name)
    require_same_logits(model, original, inputs)
    beams = 1 if name == "llama4" and "pixel_values" in inputs else len(inputs["input_ids"])
    how = {**GREEDY, "num_beams": beams}  # transformers does not repeat llama4's images for beams
    assert torch.equal(model.generate(**inputs, **how), original.generate(**inputs, **how))
    if chunk:
        require_same_logits(compiled(name, "policy=[]", f"prefill_chunk={chunk}"), original, inputs)
    assert isinstance(model, type(original))


def test_all_are_here() -> None:
    assert set(ALL) == set(AROUND)
    assert {name for name in ALL if AROUND[name].both_ways(image_config(name))} == set(BOTH_WAYS)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_nothing_dropped_is_the_same_model(name: str, batch: int) -> None:
    """A prompt with its images, left-padded in a batch."""
    chunk = 0 if name in (*STATEFUL, *BOTH_WAYS) else 7
    require_same(name, image_model(name), image_inputs(name, batch), chunk)


@pytest.mark.parametrize("name", ALL)
def test_nothing_dropped_is_the_same_model_of_text(name: str) -> None:
    require_same(name, image_model(name), text_inputs(name, 2), 0 if name in STATEFUL else 7)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gemma4", {"use_bidirectional_attention": None}),  # its smaller models: images as text
        ("gemma4", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
        ("gemma4", {"sliding_window": 3}),  # shorter than an image
        ("gemma3", {"sliding_window": 4}),
    ],
)
def test_what_a_config_says_is_followed(name: str, text: dict[str, Any]) -> None:
    original, inputs = image_model(name, **text), image_inputs(name, 2)
    model = kvcompile.compile(image_model(name, **text), overrides=["policy=[]", "kernels=sdpa"])
    require_same_logits(model, original, inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY), original.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("kernels", ["cpp", "reference"])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_every_backend_lets_tokens_of_an_image_see_each_other(name: str, kernels: str) -> None:
    model = kvcompile.compile(image_model(name), overrides=["policy=[]", f"kernels={kernels}"])
    require_same_logits(model, image_model(name), image_inputs(name, 2), apart=1e-3)


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_an_image_in_a_second_pass(name: str) -> None:
    """Types are then those of the whole text, as transformers counts them."""
    original, model, inputs = image_model(name), compiled(name), image_inputs(name)
    ids, mask, types = (inputs.pop(x) for x in ("input_ids", "attention_mask", AROUND[name].types))
    expected = original(ids, attention_mask=mask, **inputs, **{AROUND[name].types: types}).logits[:, 3:]
    cache = model(ids[:, :3]).past_key_values
    assert cache.sight is None
    later = model(ids[:, 3:], attention_mask=mask, past_key_values=cache, **inputs, **{AROUND[name].types: types})
    torch.testing.assert_close(later.logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_an_image_is_read_in_one_pass(name: str) -> None:
    pieces, inputs = compiled(name, "policy=[]", "prefill_chunk=7"), image_inputs(name)
    with pytest.raises(KvcompileError, match="read in one pass, got prefill_chunk=7") as error:
        pieces(**inputs)
    assert "\n" not in str(error.value)
    require_same_logits(pieces, image_model(name), text_inputs(name))
    require_same_logits(compiled(name, "policy=[]", "prefill_chunk=30"), image_model(name), inputs)


def test_an_image_longer_than_a_window_of_all_layers_is_refused() -> None:
    model = kvcompile.compile(image_model("gemma3", sliding_window=3), overrides=["policy=[]"])
    with pytest.raises(KvcompileError, match="an image has no more tokens than a sliding window, got 4 tokens of 3"):
        model(**image_inputs("gemma3"))


def test_vectors_of_layers_come_with_embeddings() -> None:
    model, ids = compiled("gemma3n"), text_inputs("gemma3n")["input_ids"]
    embeddings = model.get_input_embeddings()(ids)
    vectors = model.model.language_model.get_per_layer_inputs(ids)
    logits = model(inputs_embeds=embeddings, per_layer_inputs=vectors).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(KvcompileError, match="inputs_embeds without per_layer_inputs"):
        model(inputs_embeds=embeddings)


@pytest.mark.parametrize("name", ["llava", "mistral3"])
@pytest.mark.parametrize("policy", ["streaming", "snapkv"])
def test_what_is_kept_is_what_is_attended_to(name: str, policy: str) -> None:
    """After a selection among image tokens and others, the next token is the original's with the same entries."""
    budget = [f"stack.{policy}.budget=10", *(["stack.snapkv.window=4"] if policy == "snapkv" else [])]
    original, model, inputs = image_model(name), compiled(name, f"policy=[{policy}]", *budget), image_inputs(name)
    ours, theirs = model(**inputs).past_key_values, DynamicCache()
    assert ours.lengths() == [[10, 10]] * 2
    original(**inputs, past_key_values=theirs)
    for layer, held in zip(theirs.layers, ours.layers, strict=True):
        places = torch.stack([positions for _, _, positions in held.held.rows()])[None, :, :, None]
        layer.keys, layer.values = (x.gather(2, places.expand(-1, -1, -1, 16)) for x in (layer.keys, layer.values))
    token, at = torch.tensor([[11]]), torch.tensor([[30]])
    expected = original(token, past_key_values=theirs, position_ids=at).logits
    torch.testing.assert_close(model(token, past_key_values=ours).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_bytes_are_those_of_the_plan(name: str) -> None:
    model, inputs = compiled(name, "policy=[snapkv,int8]", "budget=0.5", "stack.int8.residual=4"), image_inputs(name)
    cache = model(**inputs).past_key_values
    assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, 30))
    again = copy.deepcopy(model)
    assert torch.equal(again.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


def test_what_a_text_stack_cannot_follow(tmp_path: Path) -> None:
    for settings, says in (
        (["policy=[gqa]"], "stay as they are"),
        (["policy=[]", "heal.tokens=100"], "stay as they are"),
        (["policy=[expected_attention]"], "are turned"),
    ):
        with pytest.raises(KvcompileError, match=says):
            kvcompile.compile(image_model("qwen2_vl"), overrides=settings)
    model = compiled("llava")
    with pytest.raises(KvcompileError, match="an artifact holds a model of text"):
        kvcompile.save(model, tmp_path / "artifact")
    with pytest.raises(KvcompileError, match="compiled once"):
        kvcompile.compile(model, overrides=["policy=[]"])
    with pytest.raises(KvcompileError, match="compiled around its text in Python"):
        architecture("llava")
