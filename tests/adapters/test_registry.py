"""The facts of each layer, what may be swapped, and the rotation that policies ask for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, WINDOW, rotary, tiny_config, tiny_ids, tiny_model
from transformers import T5Config

from kvcompile.adapters import architectures
from kvcompile.adapters.architecture import Architecture
from kvcompile.adapters.architectures import architecture_of, describe
from kvcompile.adapters.base import Attention
from kvcompile.adapters.families.llama import Separate
from kvcompile.compiler import compile_plan
from kvcompile.errors import KvcompileError
from kvcompile.models import outside
from kvcompile.plan import extensions
from kvcompile.stack import apply_stack, build_stack

FULL = [None] * 4
ALL_SLIDE = [WINDOW] * 4
ALTERNATE = [WINDOW, None] * 2


@pytest.mark.parametrize(
    ("name", "scale", "windows", "softcap", "kv_heads"),
    [
        ("llama", 0.25, FULL, None, 2),
        ("mistral", 0.25, ALL_SLIDE, None, 2),
        ("qwen2", 0.25, FULL, None, 2),
        ("qwen3", 0.25, FULL, None, 2),
        ("smollm3", 0.25, FULL, None, 2),
        ("olmo2", 0.25, FULL, None, 2),
        ("granite", 0.1, FULL, None, 2),
        ("mixtral", 0.25, FULL, None, 2),
        ("phi3", 0.25, ALL_SLIDE, None, 2),
        ("gemma2", 24**-0.5, ALTERNATE, 5.0, 2),
        ("gemma3_text", 24**-0.5, ALTERNATE, None, 2),
        ("gpt_neox", 0.25, FULL, None, 4),
        ("gpt_oss", 0.25, ALTERNATE, None, 2),
    ],
)
def test_facts_from_the_config_alone(
    name: str, scale: float, windows: list[int | None], softcap: float | None, kv_heads: int
) -> None:
    plan = describe(tiny_config(name), "bfloat16")
    assert (plan.architecture, plan.dtype) == (name, "bfloat16")
    assert [p.sliding_window for p in plan.layers] == windows
    assert [p.owner for p in plan.layers] == [0, 1, 2, 3]
    for p in plan.layers:
        assert p.sink == (name == "gpt_oss")
        assert (p.scale, p.softcap, p.query_heads, p.kv_heads, p.head_dim) == (scale, softcap, 4, kv_heads, 16)
    plan.check()


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(KvcompileError, match=r"'t5'.*gemma2, gemma3_text.*smollm3"):
        describe(T5Config())


class Entry:
    """An entry point of another package."""

    def __init__(self, name: str, target: Any) -> None:
        self.name, self.value, self.target = name, f"elsewhere:{name}", target

    def load(self) -> Any:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def forget() -> None:
        outside.outside.cache_clear()
        architectures.known.cache_clear()

    def install(*entries: Entry) -> None:
        monkeypatch.setattr(extensions, "entry_points", lambda group: entries if group == outside.GROUP else ())
        forget()

    yield install
    forget()


def test_an_architecture_of_another_package_stands_beside_ours(plug: Any) -> None:
    mine = Architecture(Separate, scale=lambda config: 0.5)
    plug(Entry("mine", mine))
    config = tiny_config("llama")
    config.model_type = "mine"
    assert architecture_of(config) is mine
    assert {p.scale for p in describe(config).layers} == {0.5}
    with pytest.raises(KvcompileError, match=r"'t5'.*llama, .*mellum, .*mine, minicpm3"):
        describe(T5Config())


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([Entry("llama", Architecture(Separate))], "'llama' is there twice"),
        ([Entry("mine", Architecture(Separate)), Entry("mine", Architecture(Separate))], "'mine' is there twice"),
        ([Entry("mine", Separate)], "'mine' of kvcompile.architectures must be an Architecture, got type"),
        ([Entry("mine", ImportError("no such module"))], "'elsewhere:mine' .*does not load, got no such module"),
    ],
)
def test_a_broken_architecture_of_another_package_is_one_line(plug: Any, entries: list[Entry], says: str) -> None:
    plug(*entries)
    with pytest.raises(KvcompileError, match=says) as caught:
        describe(tiny_config("llama"))
    assert "\n" not in str(caught.value)


def test_without_a_layout_nothing_is_converted(plug: Any) -> None:
    class Opaque(Separate):
        layout = None

    plug(Entry("mine", Architecture(Opaque)))
    model = tiny_model("llama")
    model.config.model_type = "mine"
    with pytest.raises(KvcompileError, match=r"weights can be converted only.*Opaque"):
        compile_plan(model, apply_stack(describe(model.config), build_stack(["mqa"], {})))
    assert compile_plan(model, describe(model.config)).kvcompile.plan.architecture == "mine"


def test_importing_the_table_imports_no_family() -> None:
    code = (
        "import sys, kvcompile.adapters.architectures; print([m for m in sys.modules if m.endswith('families.llama')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_bidirectional_attention_is_refused() -> None:
    with pytest.raises(KvcompileError, match="causal"):
        describe(tiny_config("gemma3_text", use_bidirectional_attention=True))


def test_unknown_layer_type_is_refused() -> None:
    config = tiny_config("qwen3")
    config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(KvcompileError, match=r"layer 1.*chunked_attention"):
        describe(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_swap_keeps_weights_and_names(name: str) -> None:
    model = tiny_model(name)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    names = architecture_of(model.config).swap(model, describe(model.config))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert len(names) == 4
    assert all(isinstance(model.get_submodule(n), Attention) for n in names)
    assert not any(model.get_submodule(n).training for n in names)


def _offloaded(model: Any) -> None:
    model.model.layers[3].self_attn.k_proj.to("meta")


def _foreign(model: Any) -> None:
    model.model.layers[3].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))


def _other_scale(model: Any) -> None:
    model.model.layers[3].self_attn.scaling = 1.0


def _extra_module(model: Any) -> None:
    model.model.layers[3].self_attn.gate = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_offloaded, r"layers\.3\.self_attn\.k_proj"),
        (_foreign, "layer 3"),
        (_extra_module, "gate"),
        (_other_scale, "layer 3: scale"),
    ],
)
def test_refused_swap_changes_nothing(change: Any, says: str) -> None:
    model = tiny_model("llama")
    change(model)
    with pytest.raises(KvcompileError, match=says):
        architecture_of(model.config).swap(model, describe(model.config))
    assert not any(isinstance(module, Attention) for module in model.modules())


def test_second_swap_is_refused() -> None:
    model = tiny_model("llama")
    architecture_of(model.config).swap(model, describe(model.config))
    with pytest.raises(KvcompileError, match="compiled once"):
        architecture_of(model.config).swap(model, describe(model.config))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox"])
def test_heads_are_counted_on_the_tensors(name: str) -> None:
    """With the first half of the heads, projections give the first half: nothing reads head counts from the config."""
    model, shard = tiny_model(name), tiny_model(name)
    architecture_of(model.config).swap(model, describe(model.config))
    architecture_of(shard.config).swap(shard, describe(shard.config))
    whole, half = (
        m.base_model.layers[1].get_submodule(architectures.architecture(name).attention) for m in (model, shard)
    )
    for key, linear in half.named_children():
        if key == "qkv_proj":  # 4 query, 2 key, 2 value heads of 16
            rows = torch.cat([torch.arange(0, 32), torch.arange(64, 80), torch.arange(96, 112)])
        else:
            rows = torch.arange(linear.weight.shape[0] // 2)
        if key.endswith("proj") or key == "query_key_value":
            linear.weight.data = linear.weight.data[rows]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[rows]
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    for full, part in zip(whole.project(states), half.project(states), strict=True):
        torch.testing.assert_close(part, full[:, : full.shape[1] // 2])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rotation_is_the_one_the_layer_gets(name: str) -> None:
    model, seen = tiny_model(name), {}
    attention = architectures.architecture(name).attention

    def watch(index: int) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(index, kwargs["position_embeddings"])

    for i, layer in enumerate(model.base_model.layers):
        layer.get_submodule(attention).register_forward_pre_hook(watch(i), with_kwargs=True)
    model(tiny_ids(1, 9))
    for i in range(4):
        cos, sin = rotary(model, i)(torch.arange(9))
        if name == "smollm3" and i == 3:
            assert torch.equal(cos, torch.ones(9, 16))
            assert torch.equal(sin, torch.zeros(9, 16))
        else:
            for ours, own in zip((cos, sin), architecture_of(model.config).adapter.angles(seen[i]), strict=True):
                assert torch.equal(ours, own[0])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "smollm3"])
def test_layers_share_a_rotation_only_where_they_turn_alike(name: str) -> None:
    model = tiny_model(name)
    shared = architecture_of(model.config).rotations(model)
    for i, rotation in enumerate(shared):
        for ours, own in zip(rotation(torch.arange(9)), rotary(model, i)(torch.arange(9)), strict=True):
            assert torch.equal(ours, own)
    assert len({id(r) for r in shared}) == {"llama": 1, "gemma3_text": 2, "smollm3": 2}[name]


def test_asking_for_far_rotations_does_not_disturb_the_model() -> None:
    """`dynamic` rotary modules remember the longest position that they have seen."""
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    ids = tiny_ids(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        rotary(model, 0)(torch.arange(4000, 4010))
        model.base_model.rotary_emb.original_max_seq_len = 0  # forbids the module's own way back
        assert torch.equal(model(ids).logits, before)
