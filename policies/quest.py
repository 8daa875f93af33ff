"""Quest: read the pages of tokens whose keys could score highest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.recall import Entries, Form, Grouping, Groups
from kvcompile.policies.recall import RecallPolicy


@dataclass(frozen=True)
class Pages(Grouping):
    """Pages of `page` consecutive tokens; what stands for one are the bounds of its keys, channel by channel.

    No key of a page scores more than sum_d max(q_d low_d, q_d high_d).
    """

    form: ClassVar[Form] = "bounds"
    page: int

    @property
    def block(self) -> int:
        """Only whole pages."""
        return self.page

    def count(self, entries: int, unit: int) -> int:
        """As many as there are pages; where tokens share scales, these are whole units."""
        return entries // math.lcm(self.page, unit)

    def divide(self, entries: Entries) -> Groups:
        """Bounds of each page's keys, `[R, G, 2, D]`."""
        import torch

        page = math.lcm(self.page, entries.unit)
        pages = torch.unflatten(entries.keys, 1, (-1, page))
        sizes = torch.full(pages.shape[:2], page, dtype=torch.int64, device=pages.device)
        return Groups(torch.stack((pages.amin(2), pages.amax(2)), 2), sizes)


@dataclass(frozen=True)
class Quest(RecallPolicy):
    """Keep everything, and read the pages that could hold what the query looks for.

    A page's bound on q . k decides. Layers 0 and 1 read everything. Tang et al., arXiv 2406.10774, Algorithm 1.

    page: tokens a page.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "keeps all; reads the pages whose keys could score highest"
    page: int = 16
    every: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.page >= 1, "page", "1 or more")

    def grouping(self) -> Pages:
        """Pages with bounds."""
        return Pages(self.page)
