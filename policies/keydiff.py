"""KeyDiff: keys unlike the average key carry what the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class Dissimilarity(Score):
    """s[h, j] = -cos(k_j, mean_i k_i / ||k_i||). Source: KeyDiff, arXiv 2504.15364, section 3."""

    needs = Needs(absolute=True)

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`; the mean runs over the entries the next query can see."""
        import torch.nn.functional as F

        units = F.normalize(seen.keys.float(), dim=-1)
        alive = seen.alive.unsqueeze(-1)
        mean = (units * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
        return -(units * F.normalize(mean, dim=-1)).sum(-1)


@dataclass(frozen=True)
class KeyDiff(SelectionPolicy):
    """Keep the tokens whose keys differ most from the average key; looks at no attention (arXiv 2504.15364)."""

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "tokens whose keys differ most from the average key"

    def score(self) -> Score:
        """Negative cosine to the mean key."""
        return Dissimilarity()
