"""Retrieval heads: the few KV heads that look things up keep all or most tokens, the others sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Plan
from kvcompile.plan.policy import Calibrator
from kvcompile.plan.selection import Allocation, Budget, Schedule, Selection, Traits, Uniform
from kvcompile.policies.base import TokenPolicy, choose, require_budget, scored_by

RECENCY = "streaming"


@dataclass(frozen=True)
class HeadShares(Allocation):
    """The retrieval `heads` of a layer keep `keep` of the tokens, its other heads the budget.

    `calibrated` False marks an estimate: the number of heads is right, which ones they are is not known yet.
    """

    heads: tuple[int, ...]
    keep: Budget
    calibrated: bool = True

    traits = Traits(scope="head")

    def static(self, layer: int, layers: int, heads: int, budget: int, tokens: int, floor: int) -> tuple[int, ...]:
        """`max(budget, keep)` tokens for the retrieval heads, `budget` for the others."""
        least = min(tokens, max(budget, floor))
        most = max(least, self.keep.of(tokens))
        return tuple(most if h in self.heads else least for h in range(heads))


@dataclass(frozen=True)
class RetrievalHeads(TokenPolicy):
    """Give the KV heads that retrieve (almost) all tokens, the others a small budget.

    heads: `[layer, kv_head]` pairs; left empty, calibration fills in the best `fraction` of all KV heads.
    fraction: share of all KV heads that calibration calls retrieval heads.
    keep: share of the tokens that retrieval heads keep. budget: tokens (> 1) or share (<= 1) for each other head,
    `sinks` first and `recent` last ones included; what is left of it goes by `score`.
    recent: newest tokens always kept. score: name of a policy that ranks tokens (streaming: the newest).
    decode_every: evict again after so many decoded tokens (0: never).
    samples, tokens, seed: calibration prompts of each form, their length and their seed.

    Sources: retrieval heads (arXiv 2404.15574), RazorAttention (2407.15891), DuoAttention (2410.10819).
    """

    name: ClassVar[str] = "retrieval_heads"
    summary: ClassVar[str] = (
        "all or most tokens for the calibrated heads that retrieve, sinks and a window for the others"
    )
    heads: list[list[int]] = field(default_factory=list)
    fraction: float = 0.11
    keep: float = 1.0
    budget: float = 36
    recent: int = 32
    score: str = RECENCY
    decode_every: int = 64
    samples: int = 3
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_budget(self, self.budget)
        self.require(all(len(pair) == 2 for pair in self.heads), "heads", "a list of [layer, kv_head]")
        self.require(0 < self.fraction <= 1, "fraction", "in (0, 1]")
        self.require(0 < self.keep <= 1, "keep", "in (0, 1]")
        self.require(
            self.keep == 1 or self.score != RECENCY, "score", "another where keep < 1: retrieval is not recency"
        )
        self.require(self.recent >= 0, "recent", "0 or more")
        self.require(self.samples >= 1, "samples", "1 or more")
        self.require(self.tokens >= 128, "tokens", "128 or more")

    def calibrated(self, calibrator: Calibrator) -> RetrievalHeads:
        """The policy with `heads` filled in by `kvcompile.calibration.retrieval`; as it is, where they are given."""
        if self.heads:
            return self
        from kvcompile.calibration.retrieval import retrieval_scores
        from kvcompile.calibration.text import sentences

        self.require_calibratable(calibrator.tokenizer)
        scores = retrieval_scores(calibrator, sentences(), samples=self.samples, tokens=self.tokens, seed=self.seed)
        owners = calibrator.owners
        return replace(self, heads=[[owners[i], h] for i, h in scores.top(self._number(sum(map(len, scores.scores))))])

    def require_calibratable(self, tokenizer: Any) -> None:
        """Which heads retrieve is found on prompts of text. Raises KvcompileError without a tokenizer."""
        if not self.heads and tokenizer is None:
            raise KvcompileError(
                "retrieval_heads needs a tokenizer to calibrate",
                "none",
                "pass tokenizer=, or set stack.retrieval_heads.heads",
            )

    @property
    def uncalibrated(self) -> str | None:
        """Which heads, unless they are given."""
        return None if self.heads else "which heads retrieve"

    def apply(self, plan: Plan) -> Plan:
        """Give every layer but the skipped ones a selection with its own heads.

        Raises KvcompileError for a head that the model has not, or one in a layer without a cache of its own.
        """
        heads = [(i, h) for i, h in self.heads] or self._evenly(plan)
        for i, h in heads:
            if not (0 <= i < len(plan.layers) and plan.layers[i].owner == i and 0 <= h < plan.layers[i].kv_heads):
                raise KvcompileError(
                    "stack.retrieval_heads.heads must be [layer, kv_head] pairs of layers that have a KV cache",
                    [i, h],
                    "stack.retrieval_heads.heads=[] to calibrate",
                )
        plan = plan.record(self.name, self.family)
        by_layer = [tuple(sorted({h for i, h in heads if i == p.index})) for p in plan.layers]
        for heads_here in sorted(set(by_layer)):
            others = [i for i, theirs in enumerate(by_layer) if theirs != heads_here]
            plan = choose(plan, self._for(heads_here), [*self.skip_layers, *others])
        return plan

    def _for(self, heads: tuple[int, ...]) -> Selection:
        """The selection of a layer with these retrieval heads."""
        ranked = bool(heads) or self.budget <= 1 or self.budget > self.sinks + self.recent
        return replace(
            scored_by(self.score if ranked else RECENCY),  # nothing to rank where sinks and window fill the budget
            policy=self.name,
            budget=Budget(self.budget),
            allocation=HeadShares(heads, Budget(self.keep), bool(self.heads)) if heads else Uniform(),
            schedule=Schedule(self.between_chunks, self.decode_every),
            sinks=self.sinks,
            recent=self.recent,
            positions="original",
        )

    def _number(self, heads: int) -> int:
        return max(1, round(self.fraction * heads))

    def _evenly(self, plan: Plan) -> list[tuple[int, int]]:
        """As many heads as calibration will find, spread over the layers: for an estimate of the bytes."""
        most = max(p.kv_heads for p in plan.owners)
        rows = [(p.index, h) for h in range(most) for p in plan.owners if h < p.kv_heads]
        number = self._number(len(rows))
        return [rows[k * len(rows) // number] for k in range(number)]
