"""Attention matching: what stays gets values that make up for what was dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import Family, LayerPlan, Plan
from kvcompile.plan.selection import Refit, Selection
from kvcompile.policies.replay import ReplayPolicy


@dataclass(frozen=True)
class AttentionMatching(ReplayPolicy):
    """Give the entries that stay values with which queries get what the whole cache would give them.

    After a policy that drops tokens. The text is read again, as for `kvzip`; with the weights p of a
    query of that over everything and p' over what stays, the values V of a head are changed by

        D = argmin sum over queries of || p V - p' (V + D) ||^2 + ridge w ||D||^2

    w: mean over the entries of the sum over queries of p'^2. Keys stay, so that true positions mean what they did.

    queries: of each piece and query head, spread evenly.
    ridge: how dear a change of values is.
    most: heads that keep more than this part stay as they are.
    recent: newest tokens that keep their values, since what comes next reads them with other weights than a replay.

    Source: Attention Matching, arXiv 2602.16284, section 3, of which this is the value fit; the ridge is ours.
    """

    name: ClassVar[str] = "attention_matching"
    family: ClassVar[Family] = "selection"
    summary: ClassVar[str] = "what stays gets values that make up for what was dropped; the text is read twice for that"
    queries: int = 400
    ridge: float = 3.0
    most: float = 0.5
    recent: int = 16

    def __post_init__(self) -> None:
        self.require_replay()
        self.require(self.queries >= 1, "queries", "1 or more")
        self.require(self.ridge > 0, "ridge", "above 0")
        self.require(0 < self.most <= 1, "most", "in (0, 1]")
        self.require(self.recent >= 0, "recent", "0 or more")

    def apply(self, plan: Plan) -> Plan:
        """Have every selection fit what it keeps. Raises KvcompileError where nothing, or too much, is selected."""
        if not plan.selected:
            raise KvcompileError(
                "attention_matching fits what a selection keeps, so it comes after one",
                f"after {', '.join(each.name for each in plan.applied) or 'nothing'}",
                "policy=[ghost,global_topk,attention_matching]",
            )
        return plan.record(self.name, self.family).map(self._fitted)

    def _fitted(self, p: LayerPlan) -> LayerPlan:
        s = p.selection
        if s is None:
            return p
        self._require_plain(p, s)
        schedule = replace(s.schedule, replay=self.replay(scores=False))
        fit = Refit(self.name, self.queries, self.ridge, self.most, self.recent)
        return replace(p, selection=replace(s, schedule=schedule, refit=fit))

    def _require_plain(self, p: LayerPlan, s: Selection) -> None:
        """Raise KvcompileError for what has no values of its own to fit, or none any more."""
        where = f"attention_matching: layer {p.index}"
        if s.schedule.replay is not None:
            what = s.replayer
            raise KvcompileError(f"{where} is read again already", f"{what!r} before it", "policy=[ghost,global_topk]")
        if p.latent is not None:
            got = f"attention_matching {p.latent.before}"
            raise KvcompileError(f"{where} has no values beside its latent rows", got, "drop one")
        if s.tiers is not None or s.positions == "compact":
            got = f"{s.policy!r} with {'tiers' if s.tiers else 'compact positions'}"
            raise KvcompileError(f"{where} must hold its entries alike, at their true positions", got, "drop one")
