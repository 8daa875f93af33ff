"""PagedAttention: rows in pages of a pool, shared by beams and forks until they are written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.plan.plan import LayerPlan
from kvcompile.policies.quantized import StoragePolicy

LARGEST = 4096  # tokens; every row of every layer takes a whole page with its first token


@dataclass(frozen=True)
class Paged(StoragePolicy):
    """Keys and values in pages, with a block table for each sequence and KV head (arXiv 2309.06180, section 4).

    A selection hands emptied pages back. Beams, repeated sequences and `KVCache.fork()` share pages, and copy one only
    to write to it. Under a policy that encodes old tokens (kivi) their codes lie in pages, the newest tokens do not.

    page: tokens a page, 1 to 4,096, rounded up to whole groups of tokens that share scales. Half a page a row is spare
    on average; pages in the order of memory, as a prompt leaves them, are read like one stretch whatever their size. Of
    scattered ones, large pages are read faster (`benchmarks/results/cpu_kernels.md`).
    """

    name: ClassVar[str] = "paged"
    wants: ClassVar[str] = "lie in pages"
    summary: ClassVar[str] = "pages that beams and forks share, instead of one stretch a row"
    page: int = 16

    def __post_init__(self) -> None:
        self.require(1 <= self.page <= LARGEST, "page", f"1 to {LARGEST:,} tokens; a row fills its last page by half")

    def store(self, p: LayerPlan) -> LayerPlan:
        """In pages."""
        block = p.storage.block
        return replace(p, storage=replace(p.storage, page=-(-self.page // block) * block))

    def fits(self, p: LayerPlan) -> bool:
        """Always: sliding layers too."""
        return True
