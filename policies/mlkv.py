"""MLKV: few layers have keys and values, and few heads each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcompile.plan.plan import Plan
from kvcompile.plan.structure import Fold
from kvcompile.policies.cla import share
from kvcompile.policies.gqa import HeadMerging, divisor


@dataclass(frozen=True)
class MLKV(HeadMerging):
    """`layers` layers own `heads` KV heads each; the others read the nearest owner before them (arXiv 2406.09297).

    Heads merge inside each layer first, then non-owners are folded into their owner. Untrained, heal the result.
    layers: owners, at layers 0 and int(k L / layers) (0: half of the layers). heads: KV heads of an owner (0: the
    largest proper divisor of the present number). fold: `successive` halving as in the reference code, `mean` over a
    group, or `owner` (its own weights only).
    """

    name: ClassVar[str] = "mlkv"
    summary: ClassVar[str] = "few owner layers with few KV heads each (needs healing)"
    layers: int = 0
    heads: int = 1
    fold: Fold = "successive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.layers >= 0, "layers", "0 or more")
        self.require(self.heads >= 0, "heads", "0 or more")
        self.require(self.fold in ("owner", "mean", "successive"), "fold", "owner, mean or successive")

    def kept(self, heads: int) -> int:
        """`heads`, if it divides the present number."""
        return divisor(self.name, "heads", self.heads, heads)

    def apply(self, plan: Plan) -> Plan:
        """Merge heads, then share layers. Raises KvcompileError where either cannot be."""
        number = len(plan.layers)
        self.require(self.layers <= number, "layers", f"at most the model's {number}")
        return share(super().apply(plan), self.name, nearest_owners(number, self.layers or -(-number // 2)), self.fold)


def nearest_owners(layers: int, owners: int) -> list[int]:
    """Owner of each layer, where `owners` of them stand at int(k * layers / owners)."""
    at = sorted({k * layers // owners for k in range(owners)})
    return [max(o for o in at if o <= i) for i in range(layers)]
