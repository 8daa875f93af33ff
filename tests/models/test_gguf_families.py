"""GGUF files of many families: what is read is the model that was written, with settings that are no family's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf")

from families import family_config
from gguf_families import FAMILIES, wide_model, write
from tiny import tiny_ids

import kvcompile
from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.models import loading
from kvcompile.models.gguf_settings import UNREAD, take_settings

READ = sorted(set(FAMILIES) - set(UNREAD))


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def read(path: Path) -> Any:
    return loading.load(ModelConfig(pretrained=str(path), device="cpu"))[0]


def apart(name: str, kind: str, path: Path) -> float:
    """How far logits of a written model and of what is read of it are apart, of their size."""
    model, ids = wide_model(name), tiny_ids(2, 40)
    write(model, path, kind)
    expected = model(ids).logits
    return float((read(path)(ids).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", READ)
def test_a_file_of_floats_is_the_model(name: str, tmp_path: Path) -> None:
    """Every tensor in its place and order, every setting taken."""
    assert apart(name, "F32", tmp_path / "model.gguf") < 1e-6


@pytest.mark.parametrize(("kind", "most"), [("F16", 5e-3), ("Q8_0", 8e-2)])
@pytest.mark.parametrize("name", ["gemma2", "qwen2_moe", "qwen3_5_text"])
def test_a_file_in_fewer_bits_is_near_it(name: str, kind: str, most: float, tmp_path: Path) -> None:
    assert 0 < apart(name, kind, tmp_path / "model.gguf") < most


def test_angles_of_rotary_positions_stay_float32_in_sixteen_bits(tmp_path: Path) -> None:
    """And so a compiled model of it can be saved, and turns far tokens as the checkpoint does."""
    model, path = wide_model("qwen2_moe"), tmp_path / "model.gguf"
    write(model, path, "F32")
    config = ModelConfig(pretrained=str(path), device="cpu", dtype="bfloat16")
    loaded: Any = loading.load(config)[0]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_what_was_read_is_compiled(tmp_path: Path) -> None:
    model = wide_model("gemma3_text")
    write(model, tmp_path / "model.gguf", "F32")
    compiled = kvcompile.compile(read(tmp_path / "model.gguf"), overrides=["policy=[]", "kernels=sdpa"])
    ids = tiny_ids(1, 40)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "over", "says"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "those with one key head, got 2"),
        ("stablelm", {"qk_layernorm": True}, "must have its place"),
        ("gpt_oss", {}, "transformers does not read all, got tensors of experts"),
    ],
)
def test_what_transformers_does_not_read_is_refused(name: str, over: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(wide_model(name, **over), tmp_path / "model.gguf")
    with pytest.raises(KvcompileError, match=says) as error:
        read(tmp_path / "model.gguf")
    assert "\n" not in str(error.value)


def test_a_family_that_transformers_does_not_read_is_refused(tmp_path: Path) -> None:
    write(wide_model("qwen3"), tmp_path / "model.gguf", arch="olmo2")
    with pytest.raises(KvcompileError, match="GGUF model with architecture olmo2 is not supported yet"):
        read(tmp_path / "model.gguf")


def test_weights_of_other_sizes_are_said_in_words(tmp_path: Path) -> None:
    write(wide_model("qwen3"), tmp_path / "model.gguf", feed_forward_length=64)
    with pytest.raises(KvcompileError, match="weights of other sizes than its config says"):
        read(tmp_path / "model.gguf")


def test_sizes_by_layer_are_not_read() -> None:
    with pytest.raises(KvcompileError, match="sizes that differ from layer to layer"):
        take_settings({}, family_config("gemma4_text"))


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_largest_gemmas_divide_by_hidden_size_over_heads(name: str, layers: int) -> None:
    for count, width in ((2, 32), (layers, 64)):
        config = family_config(name, hidden_size=256, head_dim=32, num_hidden_layers=count, layer_types=None)
        take_settings({}, config)
        assert config.query_pre_attn_scalar == width


def test_a_base_of_layers_that_slide_is_taken() -> None:
    config = family_config("gemma3_text")
    take_settings({"rope.freq_base": 5e5, "rope.freq_base_swa": 2e4}, config)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 5e5
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 2e4
