"""What every policy is: a frozen dataclass that folds over the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.plan.selection import Selection


class Calibrator(Protocol):
    """What calibration may use of the loaded model; the compiler provides it."""

    model: Any
    tokenizer: Any
    layers: int
    owners: list[int]  # layers with a cache of their own
    progress: Callable[[str, int, int], None]

    def attention(self, ids: Tensor, last: int) -> list[Tensor]:
        """Attention of the last `last` tokens of one sequence `ids [1, n]`: per layer `[H_kv, g, last, n]`."""
        ...

    def noise(self, ids: Tensor) -> dict[int, float]:
        """What encoding keys as the stack does adds to logits over `ids [1, n]`: standard deviation, nats, by layer."""
        ...

    def kept(self, ids: Tensor, selection: Selection) -> tuple[list[list[int]], list[int]]:
        """What a selection keeps of `ids [1, n]`, by layer with a cache of its own: by KV head, and at the least."""
        ...


@dataclass(frozen=True)
class Policy:
    """Base of all policies: a frozen dataclass whose fields are what a recipe can set, with one method, `apply`.

    `name` is how recipes call it, `family` its place in a stack, `summary` the one line that `kvcompile ls` prints.

    Examples:
        >>> from kvcompile.adapters.architectures import describe
        >>> from kvcompile.policies.int8 import Int8
        >>> plan = describe(model.config)  # everything is kept, in the model's dtype
        >>> Int8(skip_layers=[0]).apply(plan).applied
        (Applied(name='int8', family='storage'),)
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]

    def apply(self, plan: Plan) -> Plan:
        """The plan with this policy in it. Raises KvcompileError where it cannot be."""
        raise NotImplementedError

    def calibrated(self, calibrator: Calibrator) -> Policy:
        """The policy with what it must learn from the loaded model filled into its fields (default: nothing)."""
        return self

    def require_calibratable(self, tokenizer: Any) -> None:
        """Raise KvcompileError where `calibrated` could not do its work: asked before a weight is converted.

        tokenizer: that of the calibrator; None: there is none.
        """

    @property
    def uncalibrated(self) -> str | None:
        """What `calibrated` has yet to find in the loaded model, in words; None: nothing."""
        return None

    def require(self, ok: bool, name: str, rule: str) -> None:
        """Range check of a field, for `__post_init__`. Raises KvcompileError naming `stack.<policy>.<field>`."""
        if not ok:
            raise KvcompileError(f"stack.{self.name}: {name} must be {rule}", repr(getattr(self, name)))
