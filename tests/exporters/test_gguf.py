"""Exporter gguf: what the file says of a model, and that llama.cpp computes the same from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model, tiny_tokenizer

import kvcompile
from kvcompile.adapters.architectures import describe
from kvcompile.errors import KvcompileError
from kvcompile.exporters.gguf.exporter import GGUF
from kvcompile.exporters.gguf.file import paired
from kvcompile.exporters.gguf.tokenizer import pre_tokenizer
from kvcompile.stack import apply_stack, build_stack

gguf = pytest.importorskip("gguf")
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# in the interpreter that has llama_cpp: logits of a prompt, greedy tokens, and how a text is cut
LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama

found = []
for job in json.load(sys.stdin):
    llama = Llama(job["path"], n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0)
    llama.eval(job["ids"])
    logits = np.array(llama.scores[: len(job["ids"])]).tolist()
    step, greedy = int(np.argmax(llama.scores[len(job["ids"]) - 1])), []
    for _ in range(6):
        greedy.append(step)
        llama.eval([step])
        step = int(np.argmax(llama.scores[llama.n_tokens - 1]))
    words = [llama.tokenize(text.encode(), add_bos=True, special=True) for text in job.get("texts", [])]
    found.append({"logits": logits, "greedy": greedy, "words": words})
    del llama
print(json.dumps(found))
"""


def llama_python() -> str:
    """An interpreter that has llama_cpp: this one, or the one that KVCOMPILE_LLAMA_PYTHON names."""
    given = os.environ.get("KVCOMPILE_LLAMA_PYTHON")
    if not given and find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed, and KVCOMPILE_LLAMA_PYTHON names no interpreter that has it")
    return given or sys.executable


def llama_cpp(*jobs: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [llama_python(), "-c", LLAMA_CPP], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def compiled(name: str, *stack: str, **over: Any) -> Any:
    return kvcompile.compile(
        tiny_model(name, **{**WIDE, **over}), overrides=[f"policy=[{','.join(stack)}]"], tokenizer=tiny_tokenizer()
    )


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    out = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    return [int(i) for i in out[0, len(ids) :]]


def bpe_tokenizer(*steps: Any) -> Any:
    """A byte-level BPE tokenizer of 384 tokens, learned from a few sentences; `steps` cut text into words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=alphabet, special_tokens=["<|end|>", "<|start|>"], show_progress=False
    )
    backend.train_from_iterator(["the cat sat on the mat, and the rat ran at 1984 bats"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", bos_token="<|start|>", pad_token="<|end|>"
    )


def byte_level(**options: Any) -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def test_rows_of_a_head_go_from_halves_to_pairs() -> None:
    rows = torch.arange(2 * 6).view(12, 1)
    assert paired(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_holds_the_converted_weights(dtype: str, tmp_path: Path) -> None:
    model = compiled("llama", "gqa", tie_word_embeddings=True, vocab_size=400)
    tokenizer = bpe_tokenizer(byte_level())
    tokenizer.chat_template = "{{ messages[0].content }}"
    done = kvcompile.export(model, "gguf", tmp_path / "out", tokenizer, dtype=dtype)
    assert set(done.files) == {"model.gguf", "README.md"}
    read = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    facts = {name: field.contents() for name, field in read.fields.items()}
    assert facts["general.architecture"] == "llama"
    assert (facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]) == (8, 2)
    assert (facts["llama.block_count"], facts["llama.context_length"]) == (4, 512)
    assert facts["tokenizer.ggml.pre"] == "gpt-2"
    assert facts["tokenizer.ggml.tokens"][:2] == ["<|end|>", "<|start|>"]
    assert facts["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert facts["tokenizer.ggml.tokens"][384:] == [f"[PAD{i}]" for i in range(384, 400)]
    assert (facts["tokenizer.ggml.bos_token_id"], facts["tokenizer.ggml.eos_token_id"]) == (1, 0)
    assert (facts["tokenizer.ggml.add_bos_token"], facts["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert facts["tokenizer.chat_template"] == tokenizer.chat_template
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in read.tensors}
    assert "output.weight" not in found
    wanted = model.state_dict()["model.layers.1.self_attn.k_proj.weight"].to(getattr(torch, dtype)).float()
    assert np.array_equal(found["blk.1.attn_k.weight"], paired(wanted, 2).numpy())
    assert np.array_equal(found["output_norm.weight"], model.model.norm.weight.numpy(force=True))


CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", (), {}),
    "llama-gqa": ("llama", ("gqa",), {}),
    "llama-mqa-rotated": ("llama", ("mqa", "rotate"), {}),
    "llama-biases": ("llama", ("mqa",), {"attention_bias": True, "mlp_bias": True}),
    "llama-long": ("llama", ("gqa",), {"rope_parameters": LLAMA3}),
    "mistral-gqa": ("mistral", ("gqa",), {"sliding_window": None}),
    "qwen2-gqa": ("qwen2", ("gqa", "center"), {"head_dim": 8}),
    "qwen3-mqa": ("qwen3", ("mqa",), {}),
}


READ_BACK = {
    **{name: CASES[name] for name in ("llama", "llama-gqa", "llama-mqa-rotated", "mistral-gqa", "qwen2-gqa")},
    "qwen3-mqa": ("qwen3", ("mqa",), {"head_dim": 128}),  # the reader knows no other size
}


@pytest.mark.parametrize("case", READ_BACK)
def test_transformers_reads_the_same(case: str, tmp_path: Path) -> None:
    """A reader that is not ours, where llama.cpp is not at hand; it leaves out biases and factors of frequencies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind, stack, over = READ_BACK[case]
    rope = {"rope_type": "default", "rope_theta": 500.0}
    model = compiled(kind, *stack, **{**over, "rope_parameters": rope, "rms_norm_eps": 1e-3, "vocab_size": 384})
    tokenizer, ids = bpe_tokenizer(byte_level()), tiny_ids(2, 40)
    kvcompile.export(model, "gguf", tmp_path / "out", tokenizer)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)
    text = "the cats sat at 12:30, naïve bats!"
    words = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert words(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_biases_and_stretched_frequencies_are_in_the_file(tmp_path: Path) -> None:
    model = compiled("llama", "mqa", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
    for attention in (layer.self_attn for layer in model.model.layers):
        torch.nn.init.normal_(attention.q_proj.bias)
    kvcompile.export(model, "gguf", tmp_path / "out")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    state = model.state_dict()
    for ours, theirs in (
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.up_proj", "ffn_up"),
    ):
        assert np.array_equal(found[f"blk.2.{theirs}.bias"], state[f"model.layers.2.{ours}.bias"].numpy())
    bias = state["model.layers.2.self_attn.q_proj.bias"].view(8, 16)
    assert np.array_equal(found["blk.2.attn_q.bias"].reshape(8, 16)[:, 0::2], bias[:, :8].numpy())
    assert np.array_equal(found["blk.2.attn_q.bias"].reshape(8, 16)[:, 1::2], bias[:, 8:].numpy())
    plain = LLAMA3["rope_theta"] ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / found["rope_freqs.weight"], model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)


LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def read_gguf(folder: Path) -> Any:
    from kvcompile.config.schema import ModelConfig
    from kvcompile.models.loading import config_of, load

    asked = ModelConfig(pretrained=str(folder / "model.gguf"), device="cpu")
    model = load(asked)[0]
    assert model.config.rope_parameters == config_of(asked).rope_parameters  # a plan is made before weights are read
    return model


@pytest.mark.parametrize("rope", [LLAMA3, {**LLAMA3, "rope_theta": 5e5, "factor": 32.0}, LINEAR])
def test_rotary_factors_of_a_file_are_read_back(rope: dict[str, Any], tmp_path: Path) -> None:
    """transformers leaves out `rope_freqs.weight`, which every Llama-3.1 file has: another model, silently."""
    model = compiled("llama", vocab_size=384, rope_parameters=rope)
    kvcompile.export(model, "gguf", tmp_path / "out", bpe_tokenizer(byte_level()))
    read, ids = read_gguf(tmp_path / "out"), tiny_ids(2, 200)
    assert read.config.rope_parameters == rope
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("over", "says"),
    [
        ({"attention_bias": True}, "blk.0.attn_q.bias and 15 more"),
        ({"mlp_bias": True}, "bias and 11 more"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 2.0}}, "linear or llama3 scaling, got rope_freqs.weight"),
    ],
    ids=str,
)
def test_what_is_not_read_of_a_file_is_refused_by_name(over: dict[str, Any], says: str, tmp_path: Path) -> None:
    kvcompile.export(compiled("llama", vocab_size=384, **over), "gguf", tmp_path / "out", bpe_tokenizer(byte_level()))
    with pytest.raises(KvcompileError, match=re.escape(says)):
        read_gguf(tmp_path / "out")


SCALED: list[tuple[dict[str, Any], dict[str, Any] | str]] = [
    ({"type": "none", "factor": 2.0}, {"rope_type": "default"}),
    ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    (
        {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    ({"type": "yarn", "factor": 4.0}, "original_context_length"),
    ({"type": "longrope", "factor": 4.0}, "got rope.scaling.type=longrope"),
    ({"type": "linear", "factor": 4.0, "attn_factor": 2.0}, "rope.scaling.attn_factor=2.0"),
]


@pytest.mark.parametrize(("scaling", "wanted"), SCALED, ids=lambda value: str(value)[:30])
def test_rotary_scaling_in_the_metadata_is_read_or_refused(scaling: dict[str, Any], wanted: Any) -> None:
    """transformers leaves `rope.scaling.*` out too."""
    from kvcompile.models.gguf import Contents

    config, file = tiny_config("llama"), Contents((), scaling, None)
    if isinstance(wanted, str):
        with pytest.raises(KvcompileError, match=re.escape(wanted)):
            file.take_rope(config)
        return
    file.take_rope(config)
    assert config.rope_parameters == {"rope_theta": config.rope_parameters["rope_theta"], **wanted}


@pytest.mark.parametrize("window", [None, 8])
def test_the_window_is_that_of_the_file(window: int | None) -> None:
    """transformers reads none of llama-like files: a mistral would get its family's default, a phi3 lose its own."""
    from kvcompile.models.gguf import Contents

    config = tiny_config("mistral", sliding_window=16)
    Contents((), {}, None, window).take_window(config)
    assert config.sliding_window == window
    family = tiny_config("gemma2", sliding_window=16)
    Contents((), {}, None).take_window(family)
    assert family.sliding_window == 16
    with pytest.raises(KvcompileError, match=r"'llama' has, got 8 in the file and None in the config"):
        Contents((), {}, None, 8).take_window(tiny_config("llama"))


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    llama_python()
    ids = tiny_ids(1, 40)[0].tolist()
    models = {name: compiled(kind, *stack, **over) for name, (kind, stack, over) in CASES.items()}
    for name, model in models.items():
        kvcompile.export(model, "gguf", tmp_path / name)
    jobs = [{"path": str(tmp_path / name / "model.gguf"), "ids": ids} for name in models]
    for (name, model), found in zip(models.items(), llama_cpp(*jobs), strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        theirs = torch.tensor(found["logits"])
        torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert found["greedy"] == greedy(model, ids), name


def test_llama_cpp_cuts_text_the_same(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    llama_python()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps = {
        "gpt-2": (byte_level(),),
        "smollm": (pre_tokenizers.Digits(individual_digits=True), byte_level()),
        "qwen2": (pre_tokenizers.Split(Regex(words), "isolated"), byte_level(use_regex=False)),
        "llama-bpe": (
            pre_tokenizers.Split(Regex(words.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"),
            byte_level(use_regex=False),
        ),
    }
    texts = ["The cat's 1984 hats\n\n  sat, at 12:30!", "<|start|>naïve  ünïcödé → 日本語<|end|>", "\tx = y[10000]"]
    model = compiled("llama", vocab_size=384)
    made = {name: bpe_tokenizer(*step) for name, step in steps.items()}
    for name, tokenizer in made.items():
        assert pre_tokenizer(tokenizer) == name
        kvcompile.export(model, "gguf", tmp_path / name, tokenizer)
    jobs = [{"path": str(tmp_path / name / "model.gguf"), "ids": [5], "texts": texts} for name in made]
    for (name, tokenizer), found in zip(made.items(), llama_cpp(*jobs), strict=True):
        assert found["words"] == [tokenizer(text)["input_ids"] for text in texts], name


REFUSED = [
    ("gemma2", {}, [], r"GGUF files are written of llama, mistral, qwen2, qwen3, got 'gemma2'"),
    ("mistral", {}, [], r"full attention, got a sliding window of 16 in layer 0"),
    (
        "qwen2",
        {"rope_parameters": LLAMA3},
        [],
        r"rotary embeddings of 'qwen2' are written of types default, got 'llama3'",
    ),
    ("qwen2", {"head_dim": 32}, [], r"'qwen2' with as many channels in all heads as a token has, got 4 x 32 and 64"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, [], r"got 'dynamic'"),
    ("llama", {}, ["gqa", "snapkv"], r"got 'snapkv' in layer 0. Fix: export.gguf.weights_only=true"),
    ("llama", {}, ["cla"], r"no stock class"),
]


@pytest.mark.parametrize(("name", "over", "stack", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    name: str, over: dict[str, Any], stack: list[str], message: str
) -> None:
    config = tiny_config(name, **over)
    plan = apply_stack(describe(config), build_stack(stack, {}))
    with pytest.raises(KvcompileError, match=message):
        GGUF().refuse(plan, config)


def test_unknown_tokenizers_are_refused() -> None:
    from tokenizers import pre_tokenizers

    with pytest.raises(KvcompileError, match=r"byte-level BPE tokenizers, got WordLevel"):
        GGUF().refuse_tokenizer(tiny_tokenizer())
    with pytest.raises(KvcompileError, match=r"how the tokenizer cuts words"):
        GGUF().refuse_tokenizer(bpe_tokenizer(pre_tokenizers.Punctuation(), byte_level()))
    GGUF().refuse_tokenizer(None)
