"""Calibrated budgets: each KV head's part of one budget, known before the text; the second form of retrieval heads."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.policy import Calibrator
from kvcompile.plan.selection import Allocation, Traits, Uniform
from kvcompile.policies.allocation import largest_remainder
from kvcompile.policies.base import AllocationPolicy
from kvcompile.policies.global_topk import BestOfAll

LEAST = 1e-6  # of a share: heads that calibration gave nothing get what others cannot hold


@dataclass(frozen=True)
class CalibratedHeads(Allocation):
    """Each head keeps what always stays, and its share of the rest of the budget of all layers.

    n[l, h] = floor + share[l, h] * level, at most the tokens, with the one level for which all n sum to the number of
    heads times the budget; largest remainders.
    shares: of the layers that see as many tokens as this one. layer: which of them it is.
    `calibrated` False marks an estimate: the sum over all layers is right, its parts are not known yet.
    """

    shares: tuple[tuple[float, ...], ...]
    layer: int
    calibrated: bool = True

    traits = Traits(scope="head")

    def static(self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int) -> tuple[int, ...]:
        """The numbers of this layer."""
        first = sum(map(len, self.shares[: self.layer]))
        return _counts(self.shares, budget, tokens, floor)[first : first + heads]


@functools.lru_cache(4096)  # an exported program asks for every length of a prompt
def _counts(shares: tuple[tuple[float, ...], ...], budget: int, tokens: int, floor: int) -> tuple[int, ...]:
    """Tokens of all heads, layer after layer."""
    weights = [share + LEAST for row in shares for share in row]
    least = min(tokens, max(floor, 0))
    total = len(weights) * min(tokens, max(budget, least))
    counts = [float(tokens)] * len(weights)
    growing, rest = list(range(len(weights))), total - least * len(weights)
    while growing:
        level = rest / sum(weights[i] for i in growing)
        full = [i for i in growing if level * weights[i] >= tokens - least]
        if not full:
            for i in growing:
                counts[i] = least + level * weights[i]
            break
        growing = [i for i in growing if i not in set(full)]
        rest -= (tokens - least) * len(full)
    return tuple(largest_remainder(counts, total))


@dataclass(frozen=True)
class HeadBudgets(AllocationPolicy):
    """Split one budget over all layers and KV heads as the best scores lie in calibration texts.

    What `global_topk` gives each head hardly depends on the text: calibrated, it is known beforehand, and each layer
    is compressed as soon as it is read. Which entries a head keeps is still up to their scores.

    shares: of what is left of the budget after what always stays, `[layers][kv_heads]`, layers with a cache of their
    own; left empty, calibration fills them in, by `score` at this `budget`.
    samples, tokens, seed: calibration texts, their length, and where they are taken from.
    """

    name: ClassVar[str] = "head_budgets"
    summary: ClassVar[str] = "one budget for all layers and heads, split as calibrated on texts"
    default_score: ClassVar[str] = "ghost"
    shares: list[list[float]] = field(default_factory=list)
    samples: int = 4
    tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        every = [share for row in self.shares for share in row]
        self.require(not every or (min(every) >= 0 and 0 < sum(every) < math.inf), "shares", "0 or more, and not all 0")
        self.require(self.samples >= 1, "samples", "1 or more")
        self.require(self.tokens >= 128, "tokens", "128 or more")

    def allocation(self) -> Allocation:
        """None of its own until `apply` knows the layers."""
        return Uniform()

    def calibrated(self, calibrator: Calibrator) -> HeadBudgets:
        """The policy with `shares` filled in by `kvcompile.calibration.budgets`; as it is, where they are given."""
        if self.shares:
            return self
        from kvcompile.calibration.budgets import head_shares
        from kvcompile.calibration.text import sentences

        self.require_calibratable(calibrator.tokenizer)
        best = replace(self.over(self.alone()), allocation=BestOfAll())
        shares = head_shares(calibrator, sentences(), best, samples=self.samples, tokens=self.tokens, seed=self.seed)
        return replace(self, shares=shares)

    def require_calibratable(self, tokenizer: Any) -> None:
        """Budgets are found on texts. Raises KvcompileError without a tokenizer."""
        if not self.shares and tokenizer is None:
            raise KvcompileError(
                "head_budgets needs a tokenizer to calibrate",
                "none",
                "pass tokenizer=, or set stack.head_budgets.shares",
            )

    @property
    def uncalibrated(self) -> str | None:
        """The budgets, unless they are given."""
        return None if self.shares else "how much each head keeps"

    def apply(self, plan: Plan) -> Plan:
        """Give every layer that selects the part of its heads.

        Raises KvcompileError where shares are given of other layers or heads than the model has.
        """
        plan = super().apply(plan)
        heads = [p.kv_heads for p in plan.owners]
        if self.shares and [len(row) for row in self.shares] != heads:
            raise KvcompileError(
                "stack.head_budgets.shares must hold a number for each KV head of each layer that has a KV cache",
                f"{len(self.shares)} layers of {sorted({len(row) for row in self.shares})} heads",
                "stack.head_budgets.shares=[] to calibrate",
            )
        shares = self.shares or [[1.0] * count for count in heads]
        known = {p.index: tuple(row) for p, row in zip(plan.owners, shares, strict=True)}
        selected = [p for p in plan.selected if p.index not in self.skip_layers]

        def give(p: LayerPlan) -> LayerPlan:
            if p.selection is None:
                return p
            alike = [other.index for other in selected if other.sliding_window == p.sliding_window]
            table = tuple(known[i] for i in alike)
            allocation = CalibratedHeads(table, alike.index(p.index), bool(self.shares))
            return replace(p, selection=replace(p.selection, allocation=allocation))

        return plan.map(give, [p.index for p in selected])
