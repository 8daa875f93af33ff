"""MQA: one KV head for all query heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.policies.gqa import HeadMerging


@dataclass(frozen=True)
class MQA(HeadMerging):
    """Merge all KV heads of a layer into one (arXiv 1911.02150; conversion as in 2305.13245)."""

    name: ClassVar[str] = "mqa"
    summary: ClassVar[str] = "one KV head a layer, the mean of all (needs healing)"

    def kept(self, heads: int) -> int:
        """One."""
        return 1
