"""Two precisions within a row: what matters most in more bits, the rest of what stays in fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.policy import Policy
from kvcompile.plan.selection import Allocation, Budget, LayerScores, Needs, Score, Selection, Tiers, Traits
from kvcompile.plan.storage import Codec, Storage
from kvcompile.policies.base import require_budget, require_layers, scored_by

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation

BITS = (2, 4, 8)


@dataclass(frozen=True)
class AtLeast(Allocation):
    """Every entry stays whose score is alpha / N or more, N = tokens seen; what always stays has infinite scores."""

    alpha: float

    traits = Traits(scope="head")

    def allot(self, layers: Sequence[LayerScores]) -> list[Tensor]:
        """Entries at or above the threshold, int64 `[H_kv]`."""
        return [(layer.scores >= self.alpha / (layer.newest + 1)).sum(1) for layer in layers]


@dataclass(frozen=True)
class Portion(Score):
    """The scores of another score as portions of their row: s'[h, j] = max(s[h, j], 0) / sum_k max(s[h, k], 0).

    An even score is then 1 / n, whatever the unit of `of`: what thresholds alpha / n are compared with.
    """

    of: Score

    @property
    def needs(self) -> Needs:
        """What the other score must see."""
        return self.of.needs

    def observe(self, seen: Observation) -> Tensor:
        """State of the other score."""
        return self.of.observe(seen)

    def score(self, seen: Observation) -> Tensor:
        """Portions `[H_kv, n]`."""
        scores = self.of.score(seen).float().clamp(min=0).masked_fill(seen.positions < 0, 0)
        return scores / scores.sum(1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True)
class TieredPolicy(Policy):
    """Base of the policies that hold what stays in two precisions, keys and values with a scale a token each.

    high, low: bits of keys and of values in either tier.
    skip_layers: layers left as they are; those with a sliding window keep one precision.
    """

    family: ClassVar[Family] = "selection"
    high: list[int] = field(default_factory=lambda: [8, 4])
    low: list[int] = field(default_factory=lambda: [4, 2])
    skip_layers: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("high", "low"):
            bits = getattr(self, name)
            self.require(len(bits) == 2 and all(b in BITS for b in bits), name, "two of 2, 4 or 8: of keys, of values")

    def select(self, before: Selection | None) -> Selection:
        """The selection of a layer, over the one `before` in the stack."""
        raise NotImplementedError

    def apply(self, plan: Plan) -> Plan:
        """Two tiers for every layer that sees the whole context, but the skipped.

        Raises KvcompileError where none is left, or where another policy chose number formats.
        """
        plan = plan.record(self.name, self.family)
        require_layers(plan, self.name, self.skip_layers)
        layers = [p for p in plan.layers if p.index not in self.skip_layers]
        if all(p.sliding_window for p in layers):
            raise KvcompileError(
                f"{self.name}: some layer must see the whole context",
                f"none of {len(plan.layers)}, {len(self.skip_layers)} skipped",
                f"drop {self.name} from the stack",
            )
        return plan.map(self._tier, [p.index for p in layers if p.selection is not None or not p.sliding_window])

    def _tier(self, p: LayerPlan) -> LayerPlan:
        if p.sliding_window:  # what the policy says of a selection goes for its sliding layers too, in one precision
            return replace(p, selection=replace(self.select(p.selection), tiers=None))
        if p.storage.quantized:
            raise KvcompileError(
                f"layer {p.index}: a layer has only one number format, or two tiers",
                f"{self.name!r} after {p.storage.policy!r}",
                "drop one",
            )
        selection = self.select(p.selection)
        if p.owner != p.index:
            return replace(p, selection=selection)
        return replace(p, selection=selection, storage=self._storage(p.storage))

    def _storage(self, before: Storage) -> Storage:
        (key, value), low = (tuple(Codec(f"int{n}", "token") for n in bits) for bits in (self.high, self.low))
        return replace(before, key=key, value=value, low=(low[0], low[1]), policy=self.name)


@dataclass(frozen=True)
class TwoTiers(TieredPolicy):
    """Hold the entries with the highest scores in 8-bit keys and 4-bit values, the others in 4 and 2 bits.

    Over the selection before it in the stack (`policy=[snapkv,tiers]`), or over `score` alone; the tiers of DiffKV
    (LeanKV, arXiv 2412.03131) with any score. Decoded tokens are high, until the selection is applied again.

    score: name of a policy that ranks tokens (null: the one before in the stack, else expected_attention).
    budget: fraction (<= 1) or number of tokens that stay (null: as before in the stack, else all).
    share: of what stays in a head, the part that is high.
    alpha_high, alpha_low: in place of budget and share: of n tokens those are high whose portion of all scores is
    alpha_high / n or more, and those stay whose portion is alpha_low / n or more; for scores that are like attention.
    recent: newest tokens that always stay high. sinks: first tokens that do (null: as before, else 4).
    decode_every: decide again after so many decoded tokens (null: as before, else never). between_chunks: decide after
    each prefill chunk, not only after the last (null: as before, else so).
    """

    name: ClassVar[str] = "tiers"
    summary: ClassVar[str] = "what scores highest in 8 and 4 bits, the rest in 4 and 2"
    score: str | None = None
    budget: float | None = None
    share: float = 0.25
    alpha_high: float | None = None
    alpha_low: float | None = None
    recent: int = 64
    sinks: int | None = None
    decode_every: int | None = None
    between_chunks: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            require_budget(self, self.budget)
        self.require(0 <= self.share <= 1, "share", "in [0, 1]")
        self.require(self.recent >= 0, "recent", "0 or more")
        self.require(self.sinks is None or self.sinks >= 0, "sinks", "0 or more")
        self.require(self.decode_every is None or self.decode_every >= 0, "decode_every", "0 or more")
        self.require((self.alpha_low is None) == (self.alpha_high is None), "alpha_low", "given with alpha_high")
        if self.alpha_high is not None and self.alpha_low is not None:
            self.require(0 <= self.alpha_low <= self.alpha_high, "alpha_low", "in [0, alpha_high]")
            self.require(self.budget is None, "budget", "null where thresholds decide")

    def select(self, before: Selection | None) -> Selection:
        """The selection before with tiers. Raises KvcompileError where both name a score."""
        if before is not None and self.score is not None:
            raise KvcompileError(
                "a layer has only one score",
                f"stack.{self.name}.score={self.score} after {before.policy!r}",
                f"drop stack.{self.name}.score, or the policy before it",
            )
        selection = before or replace(
            scored_by(self.score or "expected_attention"), policy=self.name, budget=Budget(1.0)
        )
        changes: dict[str, Any] = {"tiers": Tiers(share=self.share), "recent": max(self.recent, selection.recent)}
        if self.alpha_high is not None and self.alpha_low is not None:
            changes |= {"tiers": Tiers(alpha=self.alpha_high), "score": Portion(selection.score), "budget": None}
            changes |= {"allocation": AtLeast(self.alpha_low), "policy": self.name}
        if self.budget is not None:
            changes |= {"budget": Budget(self.budget), "policy": self.name}
        if self.sinks is not None:
            changes["sinks"] = self.sinks
        schedule: dict[str, Any] = {"decode_every": self.decode_every, "between_chunks": self.between_chunks}
        schedule = {name: value for name, value in schedule.items() if value is not None}
        changes["schedule"] = replace(selection.schedule, **schedule)
        return replace(selection, **changes)
