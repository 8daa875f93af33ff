"""DropKV: tokens without which the outputs of the last queries would change most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

LEAST_REST = 1e-6  # of the attention that goes to other entries: a query that sees one entry alone would divide by 0


def output_change(attention: Tensor, values: Tensor) -> Tensor:
    """How much the outputs of some queries change where one entry is dropped, squared and summed up: `[H_kv, n]`.

    sum_{g, i} (p_ij / (1 - p_ij))^2 ||v_j - o_i||^2 with o_i = sum_k p_ik v_k, float32: exact for one entry and a
    softmax that spreads what it got over the others. attention: p, `[H_kv, g, w, n]`. values: `[H_kv, n, D_v]`.
    The square is expanded in float64: where p is near 1, o_i is near v_j, and little is left of large numbers.
    """
    heads, entries = attention.shape[0], attention.shape[-1]
    p = attention.reshape(heads, -1, entries).double()
    values = values.double()
    outputs = p @ values  # [H_kv, g w, D_v]
    odds = (p / (1 - p).clamp(min=LEAST_REST)).square()
    own = values.square().sum(-1) * odds.sum(1)
    cross = (values * (odds.mT @ outputs)).sum(-1)
    others = (odds * outputs.square().sum(-1, keepdim=True)).sum(1)
    return (own - 2 * cross + others).clamp(min=0).float()


@dataclass(frozen=True)
class WindowChange(Score):
    """s[h, j] = sum over the last `window` queries and the group of (p / (1 - p))^2 ||v_j - o_i||^2.

    In units of the layer's values, the same for all its heads.
    Source: DropKV, NVIDIA/kvpress pull request 284.
    """

    window: int

    comparable = True

    @property
    def needs(self) -> Needs:
        """The observation window."""
        return Needs(queries=self.window)

    def score(self, seen: Observation) -> Tensor:
        """Scores `[H_kv, n]`."""
        return output_change(seen.attention(), seen.values)


@dataclass(frozen=True)
class DropKV(SelectionPolicy):
    """Keep the tokens without which the outputs of the last `window` queries change most (DropKV, kvpress #284).

    window: last queries, whose outputs count and which always stay.
    """

    name: ClassVar[str] = "dropkv"
    summary: ClassVar[str] = "tokens without which the outputs of the last queries change most"
    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.window >= 1, "window", "1 or more")

    @property
    def recent(self) -> int:
        """The window itself stays."""
        return self.window

    def score(self) -> Score:
        """The change of outputs."""
        return WindowChange(self.window)
