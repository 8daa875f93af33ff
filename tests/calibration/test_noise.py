"""What codes do to logits: measured as they are stored, and the layers that are too loud get keys in 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from tiny import tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.analysis.compare.contest import Contest
from kvcompile.analysis.compare.entry import Entry
from kvcompile.calibration.noise import logit_noise
from kvcompile.calibration.probe import ModelCalibrator
from kvcompile.errors import KvcompileError
from kvcompile.plan.storage import PLAIN, Codec, Storage
from kvcompile.policies.kivi import KIVI
from kvcompile.runtime.observation import Observation
from kvcompile.stores.encoded.hadamard import matrix

LOUD = 2
STACK = ["policy=[center,rotate,kivi]", "stack.center.tokens=64", "stack.kivi.key_axis=token", "stack.kivi.residual=0"]


def loud_model() -> Any:
    """One layer whose keys are 30 times as long as they were."""
    model = tiny_model("qwen2")
    with torch.no_grad():
        projection = model.model.layers[LOUD].self_attn.k_proj
        for x in (projection.weight, projection.bias):
            x.mul_(30)
    return model


def seen(tokens: int = 70) -> Observation:
    """Two KV heads of 16 channels that point one way, three query heads each, nine newest queries."""
    made = torch.Generator().manual_seed(0)
    keys = torch.randn(2, tokens, 16, generator=made) + 5 * torch.randn(2, 1, 16, generator=made)
    at = torch.arange(tokens, dtype=torch.int64)
    return Observation(
        queries=torch.randn(2, 3, 9, 16, generator=made),
        query_positions=at[-9:],
        keys=keys,
        values=torch.randn(2, tokens, 16, generator=made),
        positions=at.expand(2, -1),
        lengths=torch.tensor([tokens] * 2, dtype=torch.int64),
        tokens=tokens,
        scale=0.25,
    )


def spread(x: torch.Tensor, steps: int, dim: int) -> torch.Tensor:
    """Rounded to so many steps between the least and the greatest along a dimension, in double precision."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / steps
    return ((x - low) / step).round() * step + low


@pytest.mark.parametrize("centred", [0, 64])
@pytest.mark.parametrize("rotated", [False, True])
def test_it_is_the_spread_of_what_is_added_to_logits(centred: int, rotated: bool) -> None:
    """Against double precision, in the basis in which keys are stored."""
    x = seen()
    keys, queries = x.keys.double(), x.queries.double() * x.scale
    if centred:
        keys = keys - keys[:, 4:].mean(1, keepdim=True)
    if rotated:
        keys, queries = keys @ matrix(16), queries @ matrix(16)
    expected = (queries @ (spread(keys, 15, -1) - keys).mT.unsqueeze(1)).square().mean().sqrt()
    got = logit_noise(x, Storage(key=Codec("int4", "token", 16), centred=centred, rotated=rotated))
    assert got == pytest.approx(float(expected), rel=0.02)  # scales in 16 bits


def test_scales_of_channels_are_over_whole_groups() -> None:
    x = seen()
    keys, queries = x.keys[:, :64].double(), x.queries.double() * x.scale
    whole = spread(keys.unflatten(1, (2, 32)), 15, 2).flatten(1, 2)
    expected = (queries @ (whole - keys).mT.unsqueeze(1)).square().mean().sqrt()
    assert logit_noise(x, Storage(key=Codec("int4", "channel", 32))) == pytest.approx(float(expected), rel=0.02)


def test_what_is_not_encoded_adds_nothing() -> None:
    assert logit_noise(seen(), PLAIN) == 0.0
    assert logit_noise(seen(), Storage(value=Codec("int4", "token", 16))) == 0.0


def test_a_calibrator_without_a_stack_says_so() -> None:
    with pytest.raises(KvcompileError, match="measured for a stack"):
        ModelCalibrator(tiny_model(), tiny_tokenizer(), lambda *_: None).noise(tiny_ids(1, 20))


def test_layers_above_the_threshold_become_wide_and_nothing_else_changes() -> None:
    model = kvcompile.compile(loud_model(), overrides=[*STACK, "stack.kivi.most_noise=1"], tokenizer=tiny_tokenizer())
    formats = [p.storage.key.kind for p in model.kvcompile.plan.layers]
    assert formats == ["int8" if i == LOUD else "int4" for i in range(len(formats))]
    assert {p.storage.value.kind for p in model.kvcompile.plan.layers} == {"int4"}
    quiet = kvcompile.compile(
        tiny_model("qwen2"), overrides=[*STACK, "stack.kivi.most_noise=1"], tokenizer=tiny_tokenizer()
    )
    assert {p.storage.key.kind for p in quiet.kvcompile.plan.layers} == {"int4"}


def test_eight_bits_in_the_loud_layer_are_what_its_logits_need() -> None:
    """Behind few kept tokens, that layer alone encoded: with keys in four bits the model is far off, with eight not."""
    ids = tiny_ids(2, 60)
    few = [STACK[0].replace("center", "snapkv,center"), *STACK[1:], "stack.snapkv.budget=24", "stack.snapkv.window=8"]

    def logits(layers: str, wide: str = "[]") -> torch.Tensor:
        over = [*few, f"stack.kivi.skip_layers={layers}", f"stack.kivi.wide_layers={wide}"]
        model = kvcompile.compile(loud_model(), overrides=over, tokenizer=tiny_tokenizer())
        with torch.no_grad():
            cache = model(ids[:, :50]).past_key_values
            return model(ids[:, 50:], past_key_values=cache).logits

    with torch.no_grad():
        model = kvcompile.compile(
            loud_model(), overrides=[few[0].replace(",kivi", ""), few[1], *few[4:]], tokenizer=tiny_tokenizer()
        )
        exact = model(ids[:, 50:], past_key_values=model(ids[:, :50]).past_key_values).logits
    others = str([i for i in range(4) if i != LOUD])
    narrow, wide = (float((logits(others, layers) - exact).square().mean()) for layers in ("[]", f"[{LOUD}]"))
    assert wide < 0.25 * narrow


def test_an_artifact_holds_what_was_found(tmp_path: Path) -> None:
    model = kvcompile.compile(loud_model(), overrides=[*STACK, "stack.kivi.most_noise=1"], tokenizer=tiny_tokenizer())
    kvcompile.save(model, tmp_path / "a", tokenizer=tiny_tokenizer())
    again = kvcompile.load(tmp_path / "a")
    assert again.kvcompile.plan == model.kvcompile.plan
    text = (tmp_path / "a" / "recipe.yaml").read_text()
    assert "most_noise: null" in text
    assert "wide_layers:" in text


def test_recipes_side_by_side_find_the_same_layers() -> None:
    model = loud_model()
    entry = Entry(" ".join([*STACK, "stack.kivi.most_noise=1"]))
    plan = Contest(model, tiny_tokenizer()).runner(entry).plan
    assert [p.index for p in plan.layers if p.storage.key.kind == "int8"] == [LOUD]


def test_without_a_tokenizer_it_is_refused_and_wide_layers_must_be_there() -> None:
    with pytest.raises(KvcompileError, match="kivi needs a tokenizer"):
        kvcompile.compile(tiny_model(), overrides=["policy=[kivi]", "stack.kivi.most_noise=1"])
    with pytest.raises(KvcompileError, match="wide_layers must be in 0"):
        KIVI(wide_layers=[99]).apply(describe(tiny_model().config))
    with pytest.raises(KvcompileError, match="most_noise must be above 0"):
        KIVI(most_noise=0.0)


def test_a_latent_is_wide_as_a_whole() -> None:
    """Its values are channels of the row."""
    plan = describe(family_model("deepseek_v3").config)
    stored = KIVI(key_axis="token", residual=0, wide_layers=[1]).apply(plan).layers[1].storage
    assert stored.key == stored.value
    assert stored.key is not None
    assert stored.key.kind == "int8"
    assert replace(stored.key, kind="int4") == KIVI(key_axis="token").codecs(plan.layers[1].key_dim)[0]
