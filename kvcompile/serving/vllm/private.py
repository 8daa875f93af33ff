"""Every name of vLLM that has no promise to stay, in one place; `moved()` says which ones a release has changed.

The other modules of this package import vLLM's names from here alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from vllm import __version__ as version
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

# what is overridden, wrapped or called: its owner, its name, and the arguments that we count on, in order
TOUCHED: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (Attention, "get_kv_cache_spec", ("self", "vllm_config")),
    (VllmConfig, "try_verify_and_update_config", ("self",)),
    (KVCacheSpecRegistry, "_ensure_registered", ()),
    (KVCacheSpecRegistry, "register", ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec")),
    (FullAttentionSpec, "merge", ("specs",)),
    (FullAttentionSpec, "is_uniform_with_collection", ("self", "kv_cache_specs")),
    (
        FullAttentionManager,
        "remove_skipped_blocks",
        ("self", "request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (FullAttentionManager, "_remove_blocks_in_range", ("self", "request_id", "first_block", "last_block")),
    (FullAttentionManager, "cache_blocks", ("self", "request", "num_tokens")),
    (
        FullAttentionManager,
        "find_longest_cache_hit",
        ("block_hashes", "max_length", "kv_cache_group_ids", "block_pool", "kv_cache_spec"),
    ),
    (Scheduler, "_mamba_block_aligned_split", ("self", "request", "num_new_tokens", "num_new_local_computed_tokens")),
    (Scheduler, "_get_local_prefix_cache_hit", ("self", "request")),
    (KVCacheManager, "truncate_computed_blocks", ("self", "blocks", "num_computed_tokens")),
    (CPUAttentionMetadataBuilder, "build", ("self", "common_prefix_len", "common_attn_metadata", "fast_build")),
    (CPUAttentionMetadataBuilder, "_set_isa_to_layers", ("self", "layer_names")),
    (
        CPUAttentionBackendImpl,
        "forward",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    (CommonAttentionMetadata, "replace", ("self",)),
    (InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params")),
)
FIELDS: tuple[tuple[Any, tuple[str, ...]], ...] = (  # of dataclasses
    (CommonAttentionMetadata, ("rswa_prefix_lens", "block_table_tensor", "seq_lens", "query_start_loc_cpu")),
    (CPUAttentionMetadata, ("query_start_loc", "seq_lens", "block_table")),
    (FullAttentionSpec, ("block_size", "num_kv_heads", "head_size", "sliding_window")),
)


def moved() -> list[str]:
    """Names that are no longer there or take other arguments, as `Owner.name`."""
    gone = [
        f"{_name(owner)}.{name}" for owner, name, wanted in TOUCHED if not _takes(getattr(owner, name, None), wanted)
    ]
    for cls, names in FIELDS:
        gone += [f"{cls.__name__}.{name}" for name in names if name not in cls.__dataclass_fields__]
    return gone


def _name(owner: Any) -> str:
    return str(getattr(owner, "__name__", owner))


def _takes(function: Any, wanted: tuple[str, ...]) -> bool:
    return callable(function) and tuple(inspect.signature(function).parameters)[: len(wanted)] == wanted


__all__ = [
    "FIELDS",
    "TOUCHED",
    "Attention",
    "AttentionBackendEnum",
    "CPUAttentionBackend",
    "CPUAttentionBackendImpl",
    "CPUAttentionMetadata",
    "CPUAttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "FullAttentionManager",
    "FullAttentionSpec",
    "InputProcessor",
    "KVCacheManager",
    "KVCacheSpecRegistry",
    "Scheduler",
    "VllmConfig",
    "current_platform",
    "extract_layer_index",
    "get_hf_file_to_dict",
    "moved",
    "register_backend",
    "replace_as",
    "version",
]
