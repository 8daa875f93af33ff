"""Keys less their mean, so that few bits hold what tells them apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan
from kvcompile.policies.quantized import StoragePolicy


@dataclass(frozen=True)
class Center(StoragePolicy):
    """Take off every head's mean key before its keys are stored; exact by itself.

    q . (k_j - m) = q . k_j - q . m, and what all logits of a query have in common no softmax sees. m: mean of the
    head's keys, after their position embedding, over a text, found when a model is compiled and saved with it. Keys of
    one head point much the same way, most of all where projections have a bias (Qwen2): a code spends its bits on that.
    In front of a policy that encodes, as in policy=[center,rotate,kivi].

    tokens: of the offline text.
    """

    name: ClassVar[str] = "center"
    summary: ClassVar[str] = "keys less the mean of their head, so that few bits hold what tells them apart"
    tokens: int = 1024

    def __post_init__(self) -> None:
        self.require(self.tokens >= 16, "tokens", "16 or more")

    def require_calibratable(self, tokenizer: Any) -> None:
        """Raise KvcompileError without a tokenizer."""
        if tokenizer is None:
            raise KvcompileError("center needs a tokenizer to calibrate", "none", "pass tokenizer=")

    def store(self, p: LayerPlan) -> LayerPlan:
        """Centred, in whatever format."""
        return replace(p, storage=replace(p.storage, centred=self.tokens, policy=p.storage.policy or self.name))
