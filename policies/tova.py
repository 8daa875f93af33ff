"""TOVA: the last query decides, one selection for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class LastAttention(Score):
    """s[h, j] = mean over all query heads of the layer of A[last query, j]: the same for every KV head.

    Source: TOVA, arXiv 2401.06104, section 3.
    """

    needs = Needs(queries=1, reduce="sum")
    comparable = True
    mixes_heads = True

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`; all rows hold the same entries, since every head gets the same selection."""
        last = seen.attention()[:, :, -1].mean(1) if seen.column_sums is None else seen.column_sums
        return last.mean(0).expand(last.shape[0], -1)


@dataclass(frozen=True)
class TOVA(SelectionPolicy):
    """Keep the tokens that the last query attends to, at every step; the newest always stays (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "tokens that the last query attends to, averaged over heads"
    sinks: int = 0
    decode_every: int = 1

    @property
    def recent(self) -> int:
        """The newest token, which the method as published could drop."""
        return 1

    def score(self) -> Score:
        """Attention of the last query."""
        return LastAttention()
