"""Scheduler side of a layer whose prompts shrink: which of its blocks go back to the pool, and which may be shared."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvcompile.serving.vllm.private import FullAttentionManager, FullAttentionSpec
from kvcompile.serving.vllm.rules import PromptRule


@dataclass(frozen=True, kw_only=True)
class KeptSpec(FullAttentionSpec):  # type: ignore[misc]
    """Full attention of a layer that keeps of a prompt what `rule` says.

    granularity: tokens of a block as the scheduler counts them; a kernel may see smaller blocks.
    """

    rule: PromptRule
    granularity: int

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Layers that keep different numbers of tokens need block tables of their own."""
        return len({getattr(spec, "rule", None) for spec in kv_cache_specs.values()}) == 1

    @classmethod
    def merge(cls, specs: list[KeptSpec]) -> KeptSpec:
        """One spec of layers that have the same rule.

        Raises AssertionError where they have not: vLLM merges to learn whether it can, and takes that as a no.
        """
        if len({(getattr(spec, "rule", None), spec.block_size) for spec in specs}) != 1:
            raise AssertionError("layers with different rules cannot share a block table")
        whole = FullAttentionSpec.merge(specs)
        known = {f.name: getattr(whole, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(**known, rule=specs[0].rule, granularity=specs[0].granularity)


class KeptManager(FullAttentionManager):  # type: ignore[misc]
    """Frees the head of a prompt once it is read, as a sliding window would.

    Of a prompt that shrinks, prefix caching sees those blocks alone: what the worker overwrites is never hashed, and
    never taken from another request.
    """

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give the gap of a prompt back to the pool, once all of it is computed."""
        if num_prompt_tokens is not None and processed_computed_tokens >= num_prompt_tokens:
            self._remove_blocks_in_range(request_id, 0, self.kv_cache_spec.rule.gap(num_prompt_tokens, self.block_size))

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Hash what is not overwritten later."""
        prompt = request.num_prompt_tokens
        if self.kv_cache_spec.rule.gap(prompt, self.block_size):
            num_tokens = min(num_tokens, self.kv_cache_spec.rule.reach(prompt, self.block_size))
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KeptSpec,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Hits end where the own prompt, of `max_length` + 1 tokens, will be overwritten.

        Of a request that resumes, whose answer counts too, the scheduler cuts the hit to its prompt.
        """
        most = min(max_length, kv_cache_spec.rule.reach(max_length + 1, kv_cache_spec.block_size))
        return super().find_longest_cache_hit(
            block_hashes, most, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
