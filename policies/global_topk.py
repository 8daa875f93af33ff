"""One budget for everything: the best entries stay, in whichever layer and head they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Allocation, LayerScores, Traits
from kvcompile.policies.base import AllocationPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BestOfAll(Allocation):
    """How many of the B highest scores each head has, B = sum over layers of H_kv * budget.

    What always stays has infinite scores, and so comes out of the budget. Of entries that tie for the last places those
    stay that come first in their rows, then those of earlier layers and heads. Scores are compared as they are, in
    float32: those of ghosts span more than 16 bits hold.
    """

    traits = Traits(scope="head", cross_layer=True, competing=True, compares=True)

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Tokens per head, one int64 `[H_kv]` for each layer."""
        import torch
        from torch.nn.functional import pad

        longest = max(layer.scores.shape[1] for layer in layers)
        rows = [pad(layer.scores, (0, longest - layer.scores.shape[1]), value=float("-inf")) for layer in layers]
        heads = [len(row) for row in rows]
        held = sum(int(layer.lengths.sum()) for layer in layers)
        places = min(held, sum(int(layer.budget) * n for layer, n in zip(layers, heads, strict=True)))
        return list(torch.split(_among_best(torch.cat(rows), places), heads))


def _among_best(scores: Tensor, places: int) -> Tensor:
    """How many of the `places` highest of all `scores [R, n]` each row has, int64 `[R]`."""
    if not places:
        return scores.new_zeros(len(scores)).long()
    cut = scores.flatten().kthvalue(scores.numel() - places + 1).values
    above, level = scores > cut, scores == cut
    first = level.T.flatten().cumsum(0) <= places - above.sum()  # column by column
    return above.sum(1) + (level & first.view_as(level.T).T).sum(1)


@dataclass(frozen=True)
class GlobalTopK(AllocationPolicy):
    """Split one budget over all layers and KV heads by their scores: the highest of a sequence stay, wherever they are.

    For scores that mean the same in every layer (`kvcompile ls policies` says of which that is not known).
    """

    name: ClassVar[str] = "global_topk"
    summary: ClassVar[str] = "one budget for all layers and heads: the highest scores anywhere stay"
    default_score: ClassVar[str] = "ghost"

    def allocation(self) -> Allocation:
        """By score, over everything."""
        return BestOfAll()
