"""Keys and values in the Hadamard basis, where a head's outliers are spread over its channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.plan.plan import LayerPlan
from kvcompile.policies.quantized import StoragePolicy


@dataclass(frozen=True)
class Rotate(StoragePolicy):
    """Hadamard rotation of each head before its tokens are encoded (QuaRot, arXiv 2404.00456); exact by itself.

    (H q) . (H k) = q . k: queries and keys are rotated after their position embedding, at run time; values by the
    weights (`v_proj` and `o_proj`), for nothing. In front of a policy that encodes, as in policy=[rotate,kivi].
    Head sizes that are no power of two are rotated in blocks of the largest that divides them.
    """

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "Hadamard rotation of keys and values, so that few bits hold more"

    def store(self, p: LayerPlan) -> LayerPlan:
        """Rotated, in whatever format."""
        return replace(p, storage=replace(p.storage, rotated=True, policy=p.storage.policy or self.name))
