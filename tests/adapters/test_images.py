"""Models of images and text: the text stack is compiled, and with nothing dropped the model is the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from images import PARTS, QWEN, SEEING, image_inputs, image_model
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


def test_all_are_here() -> None:
    assert set(ALL) == set(AROUND)
    assert {name for name, around in AROUND.items() if around.images is None} == set(SEEING)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_nothing_dropped_is_the_same_model(name: str, batch: int) -> None:
    """A prompt with its images, left-padded in a batch, and the tokens after it; also in chunks, and in beams."""
    original, model, inputs = image_model(name), compiled(name), image_inputs(name, batch)
    real = inputs["attention_mask"].bool()
    expected = original(**inputs).logits[real]
    torch.testing.assert_close(model(**inputs).logits[real], expected, rtol=1e-5, atol=1e-5)
    for how in ({}, {"num_beams": 2}):
        assert torch.equal(model.generate(**inputs, **GREEDY, **how), original.generate(**inputs, **GREEDY, **how))
    pieces = compiled(name, "policy=[]", "prefill_chunk=7")
    torch.testing.assert_close(pieces(**inputs).logits[real], expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model, type(original))


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


@pytest.mark.parametrize("name", SEEING)
def test_bytes_are_those_of_the_plan(name: str) -> None:
    model, inputs = compiled(name, "policy=[snapkv,int8]", "budget=0.5", "stack.int8.residual=4"), image_inputs(name)
    cache = model(**inputs).past_key_values
    assert cache.nbytes() == sum(row.bytes for row in model.kvcompile.plan.bytes(1, 30))
    again = copy.deepcopy(model)
    assert torch.equal(again.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_images_that_are_not_compiled_are_refused(name: str) -> None:
    model = compiled(name)
    ids, pixels = image_inputs(name)["input_ids"], torch.zeros(1, 3, 28, 28)
    ways = [((ids,), {"pixel_values": pixels}), ((ids,), {"token_type_ids": ids > 60})]
    if name == "gemma3":
        ways.append(((ids, pixels), {}))
    for args, kwargs in ways:
        with pytest.raises(KvcompileError, match=r"images are not compiled in a .*text alone") as error:
            model(*args, **kwargs)
        assert "\n" not in str(error.value)


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
