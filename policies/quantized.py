"""What the policies that say how tokens are stored have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.storage import Codec
from kvcompile.policies.base import require_layers


@dataclass(frozen=True)
class StoragePolicy(Policy):
    """Base of the policies that change how layers are stored; those with a sliding window stay, if not said otherwise.

    skip_layers: layers left as they are.
    """

    family: ClassVar[Family] = "storage"
    wants: ClassVar[str] = "see the whole context"  # what `fits` asks of a layer
    skip_layers: list[int] = field(default_factory=list)

    def store(self, p: LayerPlan) -> LayerPlan:
        """The plan of one layer, stored this way."""
        raise NotImplementedError

    def fits(self, p: LayerPlan) -> bool:
        """Whether a layer with a cache of its own can be stored this way."""
        return not p.sliding_window

    def apply(self, plan: Plan) -> Plan:
        """Every layer with a cache of its own that fits, but the skipped. Raises KvcompileError where none is left."""
        plan = plan.record(self.name, self.family)
        require_layers(plan, self.name, self.skip_layers)
        indices = [p.index for p in plan.owners if self.fits(p) and p.index not in self.skip_layers]
        if not indices:
            raise KvcompileError(
                f"{self.name}: some layer must {self.wants}",
                f"none of {len(plan.owners)} with a cache, {len(self.skip_layers)} skipped",
                f"drop {self.name} from the stack",
            )
        return plan.map(self.store, indices)


@dataclass(frozen=True)
class QuantizedPolicy(StoragePolicy):
    """Base of the policies that encode tokens older than the newest `residual`.

    residual: newest tokens of each KV head that keep the model's dtype.
    """

    residual: int = 0

    def __post_init__(self) -> None:
        self.require(self.residual >= 0, "residual", "0 or more")

    def codecs(self, dim: int) -> tuple[Codec, Codec]:
        """Number formats of keys and of values, both of `dim` channels."""
        raise NotImplementedError

    def store(self, p: LayerPlan) -> LayerPlan:
        """With this policy's codecs. Raises KvcompileError where another policy chose some."""
        if p.storage.quantized:
            raise KvcompileError(
                f"layer {p.index}: a layer has only one number format",
                f"{self.name!r} after {p.storage.policy!r}",
                "drop one",
            )
        key = self.codecs(p.key_dim)[0]
        value = key if p.latent else self.codecs(p.value_dim)[1]  # of a latent, values are channels of the row
        return replace(p, storage=replace(p.storage, key=key, value=value, residual=self.residual, policy=self.name))
