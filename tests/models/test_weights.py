"""Weights as people have them, quantised, sharded, adapted: compiled to the same logits, or refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import kvcompile
from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.models import loading

SELECTED = ["policy=[streaming]", "stack.streaming.budget=15", "kernels=sdpa"]
Make = Callable[..., Any]
GROUPED: dict[str, dict[str, Any]] = {
    "gptq": {"desc_act": False, "sym": True},
    "awq": {"zero_point": True, "version": "gemm"},
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A llama in float32, wide enough for blocks of 4-bit weights."""
    folder = tmp_path / "plain"
    AutoModelForCausalLM.from_config(
        tiny_config("llama", hidden_size=128, head_dim=32, intermediate_size=256), dtype=torch.float32
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def read(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


def quantised(name: str, folder: Path) -> Any:
    """The checkpoint in the weights of a package, as transformers reads it."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name in GROUPED:
        return grouped(name, folder)
    if name.startswith("torchao"):
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

        kind = Int8WeightOnlyConfig() if name == "torchao" else IntxWeightOnlyConfig(torch.int4)
        return read(folder, quantization_config=TorchAoConfig(kind))
    if name == "compressed-tensors":
        return read(packed(folder))
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if name == "nf4" else {"load_in_8bit": True}
    return read(folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu")


def grouped(name: str, folder: Path) -> Any:
    """The checkpoint in 4 bits with a scale of every 32 inputs, as GPTQ or AWQ packs it, in kernels of torch alone."""
    if name == "gptq":
        pytest.importorskip("optimum", reason="optimum is not installed")
    from transformers import AwqConfig, GPTQConfig

    where = folder.with_name(name)
    if not where.exists():
        shutil.copytree(folder, where)
        save_file(in_groups(name, load_file(folder / "model.safetensors")), where / "model.safetensors")
        claim(where, quant_method=name, bits=4, group_size=32, **GROUPED[name])
    kind = GPTQConfig(bits=4, backend="gptq_torch") if name == "gptq" else AwqConfig(bits=4, backend="torch_awq")
    return read(where, quantization_config=kind)


def in_groups(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Codes of 4 bits, eight in an int32: of inputs (gptq), or of outputs in an order of their own (awq)."""

    def eight(codes: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
        parts = torch.unflatten(codes.long(), dim, (-1, 8)).unbind(dim + 1)
        whole = torch.stack([parts[at] << (4 * i) for i, at in enumerate(order)]).sum(0)
        return torch.where(whole >= 2**31, whole - 2**32, whole).int()

    tensors: dict[str, torch.Tensor] = {}
    for key, weight in weights.items():
        if not key.endswith("_proj.weight"):
            tensors[key] = weight
            continue
        of, groups = key.removesuffix(".weight"), torch.unflatten(weight, 1, (-1, 32))
        scales = (groups.abs().amax(-1) / 7).half()
        codes = ((groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7) + 8).flatten(1).T
        zeros = torch.full_like(scales.T, 7 if name == "gptq" else 8)  # gptq stores one less
        if name == "gptq":
            tensors[f"{of}.qweight"], tensors[f"{of}.qzeros"] = eight(codes, 0), eight(zeros, 1)
            tensors[f"{of}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // 32
        else:
            tensors[f"{of}.qweight"], tensors[f"{of}.qzeros"] = (eight(x, 1, AWQ_ORDER) for x in (codes, zeros))
        tensors[f"{of}.scales"] = scales.T.contiguous()
    return tensors


def packed(folder: Path) -> Path:
    """The checkpoint as compressed-tensors packs it: int8 by output channel."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="compressed-tensors is not installed")
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        codes = torch.round(weight / scale).clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_packed"] = compressors.pack_to_int32(codes, 8)
        tensors[f"{name}_scale"], tensors[f"{name}_shape"] = scale, torch.tensor(weight.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    claim(
        folder,
        quant_method="compressed-tensors",
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
    )
    return folder


def claim(folder: Path, **quantization: Any) -> None:
    """Have the config say how the weights are quantised."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def same(make: Make, settings: list[str]) -> Any:
    """Logits of a prompt and of the tokens after it, to the bit those of the model before; the compiled model."""
    original, ids = make(), tiny_ids(1, 30)
    compiled = kvcompile.compile(make(), overrides=[*settings, "kernels=sdpa"])
    expected, got = original(ids), compiled(ids)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=0)
    token = ids[:, :1]
    theirs = original(token, past_key_values=expected.past_key_values).logits
    torch.testing.assert_close(compiled(token, past_key_values=got.past_key_values).logits, theirs)
    return compiled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchao", "torchao-int4", "compressed-tensors", "int8", "nf4", *GROUPED])
def test_quantised_weights(name: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is compressed over them as they are; what would convert or save them says so."""
    if name in GROUPED:
        pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
        from torch._dynamo import config

        monkeypatch.setattr(config, "disable", True)  # gptqmodel would compile each of its layers
    compiled = same(lambda: quantised(name, checkpoint), ["policy=[]"])
    ids = tiny_ids(1, 30)
    selected = kvcompile.compile(quantised(name, checkpoint), overrides=SELECTED)
    assert set(selected(ids).past_key_values.lengths()[0]) == {15}
    with pytest.raises(KvcompileError, match=r"must be a plain nn.Linear to be converted"):
        kvcompile.compile(quantised(name, checkpoint), overrides=["policy=[gqa]"])
    with pytest.raises(KvcompileError, match="an artifact holds plain floating-point weights"):
        kvcompile.save(compiled, tmp_path / "artifact")


@pytest.mark.filterwarnings("ignore")
def test_quantised_weights_by_name(checkpoint: Path) -> None:
    """As `model.pretrained`, where evaluations read them."""
    folder, ids = packed(checkpoint), tiny_ids(1, 30)
    model, _ = loading.load(ModelConfig(pretrained=str(folder), device="cpu"))
    assert torch.equal(model(ids).logits, read(folder)(ids).logits)


@pytest.mark.filterwarnings("ignore")
def test_dequantised_weights_are_plain(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    folder, ids = packed(checkpoint), tiny_ids(1, 30)

    def make() -> Any:
        return read(folder, quantization_config=CompressedTensorsConfig(dequantize=True))

    compiled = same(make, ["policy=[]"])
    loaded = kvcompile.load(kvcompile.save(compiled, tmp_path / "artifact"))
    assert torch.equal(loaded(ids).logits, compiled(ids).logits)
    kvcompile.compile(make(), overrides=["policy=[gqa]"])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_whose_package_is_not_there(method: str, checkpoint: Path) -> None:
    if find_spec("gptqmodel") is not None:
        pytest.skip("gptqmodel is installed")
    claim(checkpoint, quant_method=method, bits=4, group_size=32)
    with pytest.raises(KvcompileError, match=r"could not be loaded, got .*Error.*Fix: install what reads") as error:
        loading.load(ModelConfig(pretrained=str(checkpoint), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    compiled = same(lambda: read(tmp_path / "model", dtype=dtype), ["policy=[]"])
    loaded = kvcompile.load(kvcompile.save(compiled, tmp_path / "artifact"))
    assert loaded.dtype == dtype
    assert torch.equal(loaded(tiny_ids(1, 30)).logits, compiled(tiny_ids(1, 30)).logits)


def test_shards_and_a_map_of_one_device(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
        compiled = same(lambda options=options: read(tmp_path, **options), ["policy=[]"])
        assert torch.equal(compiled(tiny_ids(1, 30)).logits, tiny_model("llama")(tiny_ids(1, 30)).logits)


def test_a_map_of_several_devices_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    model = read(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    with pytest.raises(KvcompileError, match="lies on one device, got weights on cpu, disk"):
        kvcompile.compile(model, overrides=SELECTED)


@pytest.mark.filterwarnings("ignore")
def test_adapters_merged_and_not(tmp_path: Path) -> None:
    """Merged, a model is as any other; inside, they stay, and what would convert or save them says so."""
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def make(merged: bool) -> Any:
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model("llama"), lora)
        return model.merge_and_unload().eval() if merged else model.base_model.model.eval()

    merged, inside = (same(lambda merged=merged: make(merged), ["policy=[]"]) for merged in (True, False))
    ids = tiny_ids(1, 30)
    torch.testing.assert_close(inside(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(kvcompile.load(kvcompile.save(merged, tmp_path / "a"))(ids).logits, merged(ids).logits)
    with pytest.raises(KvcompileError, match="merge adapters"):
        kvcompile.save(inside, tmp_path / "b")
    with pytest.raises(KvcompileError, match="merge adapters"):
        kvcompile.compile(make(False), overrides=["policy=[gqa]"])
    with pytest.raises(KvcompileError, match=r"got PeftModel.*adapters merged"):
        kvcompile.compile(peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"])))
