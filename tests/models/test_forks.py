"""A model of an unknown type is compiled as one of a known type, exactly, or refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.models import loading

AS_LLAMA = "model.architecture=llama"


class ForkConfig(LlamaConfig):
    model_type = "fork-of-llama"


class Fork(LlamaForCausalLM):
    config_class = ForkConfig


class Louder(LlamaAttention):
    """Has llama's modules and does something else."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        states, weights = super().forward(*args, **kwargs)
        return 2 * states, weights


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def registered() -> Iterator[None]:
    AutoConfig.register(ForkConfig.model_type, ForkConfig)
    AutoModelForCausalLM.register(ForkConfig, Fork)
    yield
    AutoModelForCausalLM._model_mapping._extra_content.pop(ForkConfig, None)
    CONFIG_MAPPING._extra_content.pop(ForkConfig.model_type, None)


def fork(attention: type[nn.Module] = LlamaAttention) -> Any:
    """Llama's tiny model under another name."""
    settings = {k: v for k, v in tiny_config("llama").to_dict().items() if k != "model_type"}
    model = Fork(ForkConfig(**settings))
    model.load_state_dict(tiny_model("llama").state_dict())
    for index, layer in enumerate(model.model.layers):
        own = attention(model.config, index)
        own.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = own
    return model.eval()


def folder_of(model: Any, where: Path, **said: Any) -> Path:
    """A checkpoint of a type that nobody knows, with code of its own that nobody runs."""
    model.save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    config = json.loads((where / "config.json").read_text())
    config |= {"model_type": "lunaria", "auto_map": {"AutoConfig": "lunaria.Config"}, **said}
    (where / "config.json").write_text(json.dumps(config))
    return where


def one_line(error: Any) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_of_an_unknown_type_is_opened_as_llama(tmp_path: Path) -> None:
    folder, ids = folder_of(tiny_model("llama"), tmp_path / "lunaria"), tiny_ids(1, 12)
    with pytest.raises(KvcompileError, match="lunaria"):
        loading.config_of(ModelConfig(pretrained=str(folder)))
    asked = ModelConfig(pretrained=str(folder), architecture="llama", device="cpu")
    assert describe(loading.config_of(asked)) == describe(tiny_config("llama"))
    model, tokenizer = loading.load(asked)
    assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert tokenizer("w7")["input_ids"] == loading.tokenizer_of(asked)("w7")["input_ids"] == [7]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", ["phi3", "qwen3"])
def test_a_checkpoint_with_other_weights_is_refused(other: str, tmp_path: Path) -> None:
    folder = folder_of(tiny_model(other), tmp_path / "lunaria")
    with pytest.raises(KvcompileError, match=r"all weights of its architecture|must have its place") as error:
        loading.load(ModelConfig(pretrained=str(folder), architecture="llama", device="cpu"))
    one_line(error)


@pytest.mark.parametrize("stack", ["policy=[snapkv,kivi]", "policy=[gqa]"])
def test_a_class_of_ones_own_is_compiled_as_llama(registered: None, stack: str, tmp_path: Path) -> None:
    """To the bit as llama is; saved, it is loaded with its own class."""
    ids, settings = tiny_ids(1, 40), [stack, "budget=0.5"][: 1 if "gqa" in stack else 2]
    expected = kvcompile.compile(tiny_model("llama"), overrides=[*settings, "kernels=sdpa"])(ids)
    with pytest.raises(KvcompileError, match="fork-of-llama"):
        kvcompile.compile(fork(), overrides=settings)
    model = kvcompile.compile(fork(), overrides=[*settings, "kernels=sdpa", AS_LLAMA])
    got = model(ids)
    assert torch.equal(got.logits, expected.logits)
    assert got.past_key_values.lengths() == expected.past_key_values.lengths()
    loaded = kvcompile.load(kvcompile.save(model, tmp_path / "artifact"))
    assert isinstance(loaded, Fork)
    assert torch.equal(loaded(ids).logits, expected.logits)


def test_an_artifact_of_an_unregistered_class_says_so(registered: None, tmp_path: Path) -> None:
    folder = kvcompile.save(kvcompile.compile(fork(), overrides=["policy=[snapkv]", AS_LLAMA]), tmp_path / "artifact")
    CONFIG_MAPPING._extra_content.pop(ForkConfig.model_type)
    with pytest.raises(
        KvcompileError, match=r"must know the model's own classes, got 'fork-of-llama'.*register"
    ) as error:
        kvcompile.load(folder)
    one_line(error)


def test_what_only_looks_like_llama_is_refused(registered: None) -> None:
    model, ids = fork(Louder), tiny_ids(1, 12)
    before = model(ids).logits
    with pytest.raises(KvcompileError, match=r"only where it computes what that does.*apart") as error:
        kvcompile.compile(model, overrides=["policy=[snapkv]", AS_LLAMA])
    one_line(error)
    assert torch.equal(model(ids).logits, before), "a refused model is as it was"


@pytest.mark.parametrize(
    ("architecture", "says"),
    [("phi3", "exactly o_proj, qkv_proj"), ("gpt2", "is compiled as 'gpt2' only"), ("bert", "encoder")],
)
def test_another_family_is_refused(registered: None, architecture: str, says: str) -> None:
    with pytest.raises(KvcompileError, match=says) as error:
        kvcompile.compile(fork(), overrides=["policy=[snapkv]", f"model.architecture={architecture}"])
    one_line(error)


def test_a_known_type_is_compiled_as_itself(tmp_path: Path) -> None:
    with pytest.raises(KvcompileError, match="it compiles 'qwen2', got 'llama'"):
        kvcompile.compile(tiny_model("qwen2"), overrides=[AS_LLAMA])
    folder = folder_of(tiny_model("llama"), tmp_path / "lunaria")
    with pytest.raises(KvcompileError, match="must be a model_type that kvcompile compiles, got lama"):
        loading.config_of(ModelConfig(pretrained=str(folder), architecture="lama"))
