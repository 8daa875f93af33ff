"""A Llama-like model as a GGUF file: hyperparameters, tensors by llama.cpp's names, its order of rotary channels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, get_tensor_name_map
from gguf.constants import MODEL_ARCH_NAMES
from gguf.quants import quantize
from torch import Tensor

from kvcompile.adapters.center import without_centers
from kvcompile.errors import KvcompileError
from kvcompile.exporters.gguf.tokenizer import add_tokenizer

KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
PAIRED = ("llama",)  # families whose rotary channels llama.cpp keeps side by side


def write_file(model: Any, tokenizer: Any, path: Path, family: str, dtype: str = "auto") -> None:
    """Write a compiled model to `path`, matrices in `dtype`; tensors go out one at a time.

    Raises KvcompileError for a weight that llama.cpp's family has no place for.
    """
    dtype = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if dtype not in KINDS:
        raise KvcompileError(f"GGUF files hold {', '.join(KINDS)}", dtype, "export.gguf.dtype=float32")
    kind, file_type = KINDS[dtype]
    writer = GGUFWriter(path, family)
    _add_facts(writer, model, file_type)
    add_tokenizer(writer, tokenizer, model)
    for name, weight in tensors(model, family):
        of = kind if weight.dim() > 1 else GGMLQuantizationType.F32
        itemsize = 4 if of is GGMLQuantizationType.F32 else 2
        writer.add_tensor_info(name, list(weight.shape), None, weight.numel() * itemsize, of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight in tensors(model, family):
        numbers = weight.detach().float().cpu().contiguous().numpy()
        writer.write_tensor_data(quantize(numbers, kind if weight.dim() > 1 else GGMLQuantizationType.F32))
    writer.close()


def tensors(model: Any, family: str) -> Iterator[tuple[str, Tensor]]:
    """(name in GGUF, weight) of everything that the file holds, an output that is tied to the embeddings left out."""
    config = model.config
    number = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[family]
    names = get_tensor_name_map(number, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, weight in without_centers(model.state_dict()).items():
        if tied and key == "lm_head.weight":
            continue
        name = names.get_name(key, (".weight", ".bias"))
        if name is None:
            raise KvcompileError(f"a GGUF file of {family!r} has a place for every weight", key, "export=[hf]")
        of = next((count for part, count in heads.items() if f".{part}." in key), None)
        yield name, paired(weight, of) if of and family in PAIRED else weight
    factors = rope_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def paired(weight: Tensor, heads: int) -> Tensor:
    """Rows `[H D, ...]` of each head from halves (c, c + D/2) to pairs (2c, 2c + 1), as llama.cpp rotates them."""
    return torch.unflatten(weight, 0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def rope_factors(model: Any) -> Tensor | None:
    """What llama.cpp divides the frequencies theta^(-2c/D) by, `[D/2]`, to get the model's; None: nothing."""
    rotary, dim = model.base_model.rotary_emb, _head_dim(model.config)
    own = rotary.inv_freq.detach().double().cpu()
    plain = float(model.config.rope_parameters["rope_theta"]) ** (
        -torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
    )
    factors = (plain / own).float()
    return None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else factors


def _add_facts(writer: GGUFWriter, model: Any, file_type: LlamaFileType) -> None:
    config = model.config
    writer.add_type("model")
    writer.add_name(Path(config._name_or_path or type(model).__name__).name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
