"""What a policy is: a frozen dataclass whose fields are its schema, and one method, `apply(plan) -> plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kvcompile.errors import KvcompileError
from kvcompile.plan import Family, LayerPlan, Plan
from kvcompile.selection import Allocation, Budget, Schedule, Score, Selection, Uniform

if TYPE_CHECKING:
    from torch import Tensor


class Calibrator(Protocol):
    """What calibration may use of the loaded model; the compiler provides it."""

    model: Any
    tokenizer: Any
    layers: int
    progress: Callable[[str, int, int], None]

    def attention(self, ids: Tensor, last: int) -> list[Tensor]:
        """Attention of the last `last` tokens of one sequence `ids [1, n]`: per layer `[H_kv, g, last, n]`."""
        ...


@dataclass(frozen=True)
class Policy:
    """Base of all policies. `name` is how recipes call it, `summary` the one line `kvcompile ls` prints."""

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]

    def apply(self, plan: Plan) -> Plan:
        """The plan with this policy in it. Raises KvcompileError where it cannot be."""
        raise NotImplementedError

    def calibrated(self, calibrator: Calibrator) -> Policy:
        """The policy with what it must learn from the loaded model filled into its fields (default: nothing)."""
        return self

    def require(self, ok: bool, name: str, rule: str) -> None:
        """Range check of a field, for `__post_init__`. Raises KvcompileError naming `stack.<policy>.<field>`."""
        if not ok:
            raise KvcompileError(f"stack.{self.name}: {name} must be {rule}", repr(getattr(self, name)))


@dataclass(frozen=True)
class SelectionPolicy(Policy):
    """Base of the policies that keep some tokens: a score, an allocation, a schedule.

    budget: fraction of the tokens seen (<= 1) or tokens (> 1), per KV head.
    sinks: first tokens always kept. decode_every: evict again after so many decoded tokens (0: never).
    between_chunks: evict after each prefill chunk, not only after the last (see `prefill_chunk`).
    skip_layers: layers left whole.
    """

    family: ClassVar[Family] = "selection"
    budget: float = 0.2
    sinks: int = 4
    decode_every: int = 0
    between_chunks: bool = True
    skip_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.require(
            0 < self.budget <= 1 or (float(self.budget).is_integer() and self.budget > 1),
            "budget",
            "in (0, 1] or a whole number of tokens",
        )
        self.require(self.sinks >= 0, "sinks", "0 or more")
        self.require(self.decode_every >= 0, "decode_every", "0 or more")

    def score(self) -> Score:
        """How entries are ranked."""
        raise NotImplementedError

    def allocation(self) -> Allocation:
        """How the budget is split over layers and heads."""
        return Uniform()

    @property
    def recent(self) -> int:
        """Newest tokens that always stay."""
        return 0

    def selection(self) -> Selection:
        """The whole selection as data."""
        return Selection(
            policy=self.name,
            score=self.score(),
            budget=Budget(self.budget),
            allocation=self.allocation(),
            schedule=Schedule(self.between_chunks, self.decode_every),
            sinks=self.sinks,
            recent=self.recent,
        )

    def apply(self, plan: Plan) -> Plan:
        """Give every layer but the skipped ones this selection."""
        return choose(plan.record(self.name, self.family), self.selection(), self.skip_layers)


def choose(plan: Plan, selection: Selection, skip_layers: list[int]) -> Plan:
    """The plan with `selection` on every layer not skipped. Raises KvcompileError if another policy selects there."""
    outside = [i for i in skip_layers if not 0 <= i < len(plan.layers)]
    if outside:
        raise KvcompileError(f"stack.{selection.policy}: skip_layers must be in 0..{len(plan.layers) - 1}", outside)

    def give(p: LayerPlan) -> LayerPlan:
        if p.selection is not None:
            raise KvcompileError(
                f"layer {p.index}: one selection a layer",
                f"{selection.policy!r} after {p.selection.policy!r}",
                f"drop one, or use one as the other's score (stack.adakv.score={selection.policy})",
            )
        return replace(p, selection=selection)

    return plan.map(give, [p.index for p in plan.layers if p.index not in skip_layers])
