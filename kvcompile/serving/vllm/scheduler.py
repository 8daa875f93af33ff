"""A scheduler whose chunks end at the end of a prompt, so that a preempted request resumes to what it was."""

from __future__ import annotations

from typing import Any

from kvcompile.serving.vllm.private import Scheduler
from kvcompile.serving.vllm.rules import chunk, last_chunk
from kvcompile.serving.vllm.spec import KeptSpec


class SplitScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler with chunks cut at the prompt's end, and prefix hits at what the prompt will overwrite.

    A request that was preempted reads prompt and answer again; in one chunk, its answer would see the whole prompt.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.need_mamba_block_aligned_split = True  # the one hook that cuts chunks, which asks only where this is set
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self._kept = [spec for spec in specs if isinstance(spec, KeptSpec)]
        self._last_chunk = last_chunk([spec.rule for spec in self._kept])

    def _mamba_block_aligned_split(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        start = request.num_computed_tokens + num_new_local_computed_tokens + num_external_computed_tokens
        return chunk(start, num_new_tokens, request.num_prompt_tokens, self._last_chunk)

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        blocks, hit, *others = super()._get_local_prefix_cache_hit(request)
        n = request.num_prompt_tokens
        most = min((s.rule.reach(n, s.block_size) for s in self._kept if s.rule.gap(n, s.block_size)), default=hit)
        if hit > most:
            blocks, hit = self.kv_cache_manager.truncate_computed_blocks(blocks, most), most
        return blocks, hit, *others
