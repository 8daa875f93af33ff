"""Worker side on CPUs: stock attention over what is left of each prompt, and compaction where a prompt ends."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.runtime.cache import Rotary
from kvcompile.serving.vllm.choice import Prompt, carry, remember, stay, waiting
from kvcompile.serving.vllm.private import (
    CommonAttentionMetadata,
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    extract_layer_index,
)
from kvcompile.serving.vllm.reading import Chunk, Readings
from kvcompile.serving.vllm.rules import PromptRule
from kvcompile.serving.vllm.spec import KeptSpec
from kvcompile.serving.vllm.turning import rotations

FORMATS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
ISA = "vec"  # of vLLM's kernels: the one whose blocks are known, K as `[D, B]`, V as `[B, D]`


@dataclass(frozen=True)
class Ending:
    """A prompt that ends in this step: its row in the batch, its n tokens, those that stay, and its blocks."""

    row: int
    tokens: int
    kept: int
    blocks: Tensor


@dataclass
class KeptMetadata(CPUAttentionMetadata):  # type: ignore[misc]
    """Stock metadata over what is left of each prompt, and the prompts that end in this step.

    chunks: what it reads of prompts, for a score that counts every query. rotaries: of layers by name, where such a
    score asks for them. most: prompts that can be half read at once.
    """

    rule: PromptRule | None = None
    endings: tuple[Ending, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    rotaries: dict[str, Rotary] = field(default_factory=dict)
    most: int = 0


class KeptBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Shows stock attention the block table without its gap, and sequences shorter by it."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if isinstance(kv_cache_spec, KeptSpec):
            _require_known(self.isa, kv_cache_spec)
            self.isa: str = ISA  # never AMX, whose blocks are laid out in tiles
            self._set_isa_to_layers(layer_names)
            self._rotaries: dict[str, Rotary] = {}
            if kv_cache_spec.rule.turns:
                by_layer = rotations(vllm_config.model_config.hf_config)
                self._rotaries = {name: by_layer[extract_layer_index(name)] for name in layer_names}

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Metadata of one step; stock where the layers of this group keep everything."""
        if not isinstance(self.kv_cache_spec, KeptSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        spec, rule = self.kv_cache_spec, self.kv_cache_spec.rule
        shown, endings = compacted(common_attn_metadata, spec)
        built = super().build(common_prefix_len, shown, fast_build)
        stock = {f.name: getattr(built, f.name) for f in fields(built)}
        read = chunks(common_attn_metadata, spec) if rule.remembers else ()
        most = self.vllm_config.scheduler_config.max_num_seqs
        return KeptMetadata(**stock, rule=rule, endings=endings, chunks=read, rotaries=self._rotaries, most=most)


def compacted(seen: Any, spec: KeptSpec) -> tuple[Any, tuple[Ending, ...]]:
    """The metadata `seen` without what earlier steps have freed of each prompt, and the prompts that end now."""
    if seen.rswa_prefix_lens is None:
        raise KvcompileError("kvcompile needs the lengths of the prompts", "none in the metadata of vLLM")
    block, rule = spec.block_size, spec.rule  # of the kernel; whole ones of the scheduler's are freed
    starts, table = seen.query_start_loc_cpu.tolist(), seen.block_table_tensor
    gaps, endings = [], []
    for row, (tokens, end) in enumerate(zip(seen.rswa_prefix_lens.tolist(), seen.seq_lens.tolist(), strict=True)):
        computed = end - (starts[row + 1] - starts[row])
        gap = rule.gap(tokens, spec.granularity) * spec.granularity // block
        gaps.append(gap if computed >= tokens else 0)
        if gap and computed < tokens <= end:
            blocks = table[row, : -(-tokens // block)].long()
            endings.append(Ending(row, tokens, tokens - gap * block, blocks))
    if any(gaps):
        gone = torch.tensor(gaps, device=table.device, dtype=torch.int64)
        at = torch.arange(table.shape[1], device=table.device, dtype=torch.int64) + gone.unsqueeze(1)
        shown = table.gather(1, at.clamp(max=table.shape[1] - 1))
        lengths = seen.seq_lens - (gone * block).to(seen.seq_lens.dtype)
        seen = seen.replace(block_table_tensor=shown, seq_lens=lengths)
    return seen, tuple(endings)


def chunks(seen: Any, spec: KeptSpec) -> tuple[Chunk, ...]:
    """What the step of `seen` reads of prompts that will shrink."""
    starts, found = seen.query_start_loc_cpu.tolist(), []
    for row, (tokens, end) in enumerate(zip(seen.rswa_prefix_lens.tolist(), seen.seq_lens.tolist(), strict=True)):
        start, stop = end - (starts[row + 1] - starts[row]), min(end, tokens)
        if start < stop and spec.rule.gap(tokens, spec.granularity):
            blocks = seen.block_table_tensor[row, : -(-stop // spec.block_size)].long()
            found.append(Chunk(row, start, stop, stop == tokens, blocks))
    return tuple(found)


def _require_known(isa: str, spec: KeptSpec) -> None:
    """Raise KvcompileError for blocks whose layout is not known."""
    if isa not in (ISA, "amx"):
        raise KvcompileError(
            "kvcompile moves entries in blocks of vLLM's 'vec' kernels",
            f"{isa!r}, for blocks of {spec.block_size} tokens and heads of {spec.head_size}",
            "--block-size 32, on an x86 CPU",
        )


class KeptImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """Stock attention, then the compaction of the prompts that end in this step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._readings = Readings()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of one layer in one step, `[tokens, H_q, D]`."""
        result: Tensor = super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        if isinstance(attn_metadata, KeptMetadata) and attn_metadata.rule is not None:
            for chunk in attn_metadata.chunks:
                self._remember(layer, attn_metadata, attn_metadata.rule, chunk, kv_cache, query)
            for ending in attn_metadata.endings:
                self._compact(layer, attn_metadata, attn_metadata.rule, ending, kv_cache, query)
        return result

    def _remember(
        self, layer: Any, m: KeptMetadata, rule: PromptRule, chunk: Chunk, cache: Tensor, query: Tensor
    ) -> None:
        """Keep of the queries of a chunk what the score will ask for."""
        history, rotary = self._readings.of(chunk, m.most), m.rotaries.get(layer.layer_name)
        first = int(m.query_start_loc[chunk.row])
        queries = query[first : first + chunk.stop - chunk.start]
        remember(rule, history, queries, chunk.start, rotary)
        left = waiting(rule, history, chunk.stop, chunk.ends)
        if left is not None:
            so_far = self._decoded(layer, *read_blocks(cache, chunk.blocks, chunk.stop))
            prompt = Prompt(*so_far, queries, self.scale, self.logits_soft_cap or None, history, rotary)
            carry(rule, prompt, left)

    def _compact(
        self, layer: Any, m: KeptMetadata, rule: PromptRule, ending: Ending, cache: Tensor, query: Tensor
    ) -> None:
        first, last, end = (int(x) for x in (*m.query_start_loc[ending.row : ending.row + 2], m.seq_lens[ending.row]))
        stored = read_blocks(cache, ending.blocks, ending.tokens)
        newest = query[first : last - (end - ending.tokens)]
        history = self._readings.end(int(ending.blocks[0])) if rule.remembers else None
        known = history, m.rotaries.get(layer.layer_name)
        prompt = Prompt(*self._decoded(layer, *stored), newest, self.scale, self.logits_soft_cap or None, *known)
        chosen = stay(rule, prompt, ending.kept).unsqueeze(-1)
        write_last(cache, ending.blocks, ending.tokens, *(x.take_along_dim(chosen, 1) for x in stored))

    def _decoded(self, layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stored numbers as attention takes them."""
        kind = FORMATS.get(self.kv_cache_dtype)
        if kind is None:
            return keys, values
        scales = layer._k_scale_float, layer._v_scale_float
        return tuple(x.view(kind).float() * by for x, by in zip((keys, values), scales, strict=True))


class KeptBackend(CPUAttentionBackend):  # type: ignore[misc]
    """vLLM's CPU backend; a model without a plan runs it as it is."""

    @staticmethod
    def get_impl_cls() -> type[KeptImpl]:
        """Attention that compacts."""
        return KeptImpl

    @staticmethod
    def get_builder_cls() -> type[KeptBuilder]:
        """Metadata without the gap."""
        return KeptBuilder


def halves(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of K `[blocks, H, D, B]` and V `[blocks, H, B, D]` in pages `[blocks, H, B, 2 D]` of the kernels 'vec'."""
    blocks, heads, block, _ = cache.shape
    keys, values = cache.view(blocks, heads, 2 * block, -1).chunk(2, 2)
    return keys.view(blocks, heads, -1, block), values


def read_blocks(cache: Tensor, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a prompt of `tokens` in `blocks`, `[H, tokens, D]` each, as stored; copies."""
    keys, values = halves(cache)
    rows = (x.transpose(0, 1).flatten(1, 2)[:, :tokens] for x in (keys[blocks].mT, values[blocks]))
    return tuple(rows)  # type: ignore[return-value]


def write_last(cache: Tensor, blocks: Tensor, tokens: int, keys: Tensor, values: Tensor) -> None:
    """Put `keys, values [H, kept, D]`, as stored, into the last slots of a prompt of `tokens`."""
    block = cache.shape[2]
    at = torch.arange(tokens - keys.shape[1], tokens, device=blocks.device, dtype=torch.int64)
    own, slot = blocks[at // block], at % block
    k, v = halves(cache)
    k[own, :, :, slot] = keys.transpose(0, 1)
    v[own, :, slot] = values.transpose(0, 1)
