"""What the policies that keep every token and read few of them have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.recall import Grouping, Recall
from kvcompile.plan.selection import Budget
from kvcompile.policies.base import require_budget, require_layers


@dataclass(frozen=True)
class RecallPolicy(Policy):
    """Base of the policies that divide tokens into groups and read those that a step's queries want most.

    Nothing is dropped. A step reads the sinks, `budget` tokens of the best groups, and the newest tokens, which are in
    no group yet. A subclass says how tokens are divided.

    budget: fraction of the tokens seen (<= 1) or tokens (> 1), per KV head and step. sinks: first tokens always read.
    recent: newest tokens always read. every: decoded tokens that are put into groups together. agree: how the query
    heads of a KV head agree on a group, by the mean or the max of what they score. reuse: steps that a choice stands
    for. skip_layers: layers that read everything.
    """

    family: ClassVar[Family] = "recall"
    budget: float = 1024
    sinks: int = 16
    recent: int = 32
    every: int = 320
    agree: Literal["mean", "max"] = "mean"
    reuse: int = 1
    skip_layers: list[int] = field(default_factory=lambda: [0, 1])

    def __post_init__(self) -> None:
        require_budget(self, self.budget)
        for name in ("sinks", "recent"):
            self.require(getattr(self, name) >= 0, name, "0 or more")
        for name in ("every", "reuse"):
            self.require(getattr(self, name) >= 1, name, "1 or more")

    def grouping(self) -> Grouping:
        """How tokens are divided into groups."""
        raise NotImplementedError

    def recall(self) -> Recall:
        """The whole recall as data."""
        return Recall(
            policy=self.name,
            grouping=self.grouping(),
            budget=Budget(self.budget),
            sinks=self.sinks,
            recent=self.recent,
            every=self.every,
            agree=self.agree,
            reuse=self.reuse,
        )

    def apply(self, plan: Plan) -> Plan:
        """Every layer with a cache of its own that sees the whole context, but the skipped, recalls.

        Raises KvcompileError where none is left, or where another policy says what is read.
        """
        plan = plan.record(self.name, self.family)
        require_layers(plan, self.name, self.skip_layers)
        chosen = [p.index for p in plan.owners if not p.sliding_window and p.index not in self.skip_layers]
        if not chosen:
            raise KvcompileError(
                f"{self.name}: some layer must see the whole context",
                f"none of {len(plan.owners)} with a cache, {len(self.skip_layers)} skipped",
                f"stack.{self.name}.skip_layers=[]" if self.skip_layers else f"drop {self.name} from the stack",
            )
        return plan.map(self._recalling, chosen)

    def _recalling(self, p: LayerPlan) -> LayerPlan:
        if p.recall is not None:
            raise KvcompileError(
                f"layer {p.index}: a layer has only one recall", f"{self.name!r} after {p.recall.policy!r}", "drop one"
            )
        return replace(p, recall=self.recall())
