"""KNorm: keys of low norm attract attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class LowNorm(Score):
    """s[h, j] = -||k_j||_2. Source: arXiv 2406.11430, section 3."""

    needs = Needs(absolute=True)

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`."""
        import torch

        norms: Tensor = torch.linalg.vector_norm(seen.keys.float(), dim=-1)
        return -norms


@dataclass(frozen=True)
class KNorm(SelectionPolicy):
    """Keep the tokens whose keys have the smallest L2 norm; looks at no attention (arXiv 2406.11430)."""

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "tokens whose keys have the smallest norm"

    def score(self) -> Score:
        """Negative norm."""
        return LowNorm()
