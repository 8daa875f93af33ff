"""What the policies that say how tokens are stored have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan import Family, LayerPlan, Plan
from kvcompile.policies.base import Policy, require_layers
from kvcompile.storage import Codec


@dataclass(frozen=True)
class StoragePolicy(Policy):
    """Base of the policies about number formats. Layers with a sliding window keep the model's dtype.

    skip_layers: layers left as they are.
    """

    family: ClassVar[Family] = "storage"
    skip_layers: list[int] = field(default_factory=list)

    def store(self, p: LayerPlan) -> LayerPlan:
        """The plan of one layer, stored this way."""
        raise NotImplementedError

    def apply(self, plan: Plan) -> Plan:
        """Every layer with a cache of its own but the sliding and the skipped ones.

        Raises KvcompileError where none is left.
        """
        plan = plan.record(self.name, self.family)
        require_layers(plan, self.name, self.skip_layers)
        owners = [p for p in plan.layers if p.owner == p.index and p.index not in self.skip_layers]
        mine = [p.index for p in owners if not p.sliding_window]
        if not mine:
            raise KvcompileError(
                f"{self.name}: some layer must see the whole context",
                f"{sum(bool(p.sliding_window) for p in owners)} sliding layers, {len(self.skip_layers)} skipped",
                f"drop {self.name} from the stack",
            )
        return plan.map(self.store, mine)


@dataclass(frozen=True)
class CodedPolicy(StoragePolicy):
    """Base of the policies that encode tokens older than the newest `residual`.

    residual: newest tokens of each KV head that keep the model's dtype.
    """

    residual: int = 0

    def __post_init__(self) -> None:
        self.require(self.residual >= 0, "residual", "0 or more")

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Number formats of keys and values of `dim` channels."""
        raise NotImplementedError

    def store(self, p: LayerPlan) -> LayerPlan:
        """With this policy's codecs. Raises KvcompileError where another policy chose some."""
        if p.storage.coded:
            raise KvcompileError(
                f"layer {p.index}: one number format a layer", f"{self.name!r} after {p.storage.policy!r}", "drop one"
            )
        key, value = self.codecs(p.head_dim)
        return replace(p, storage=replace(p.storage, key=key, value=value, residual=self.residual, policy=self.name))
