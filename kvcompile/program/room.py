"""How many entries a layer keeps of how many tokens, as tables that a program can look up, and the room it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvcompile.plan import LayerPlan, Plan
from kvcompile.storage import FLUSH

if TYPE_CHECKING:
    from kvcompile.selection import Score, Selection


@dataclass(frozen=True)
class Limits:
    """What the programs are made for: sequences at once, longest prompt, most tokens after it."""

    batch: int
    prompt: int
    new: int

    @property
    def tokens(self) -> int:
        """Longest sequence."""
        return self.prompt + self.new


@dataclass(frozen=True)
class Room:
    """The cache of one owner layer: `capacity` entries a row.

    kept `[t][h]`, recent `[t]`: entries per head, and newest tokens among them, that stay of `t` tokens (a selection
    only). ring: entry of position p lies at p % capacity, so that a new token replaces the one that left the window.
    window: newest queries that the selection looks at again while decoding (0: none, or the last one alone).
    body: encoded entries a row, which come before the others; a multiple of the storage's block.
    floors `[t]`: the scores say how the heads split `kept [t][0]` entries, of which each has at least so many; then all
    heads share one row (empty: every head has a row).
    """

    plan: LayerPlan
    capacity: int
    kept: tuple[tuple[int, ...], ...] = ()
    recent: tuple[int, ...] = ()
    ring: bool = False
    window: int = 0
    body: int = 0
    floors: tuple[int, ...] = ()

    @property
    def shared(self) -> bool:
        """Whether all heads share one row, which says of every entry whose it is."""
        return bool(self.floors)

    @property
    def rows(self) -> int:
        """Rows of a sequence."""
        return 1 if self.shared else self.plan.kv_heads

    @property
    def coded(self) -> bool:
        """Whether older entries are encoded."""
        return self.plan.storage.coded

    @property
    def score(self) -> Score:
        """How the selection ranks entries."""
        if self.plan.selection is None:
            raise RuntimeError(f"layer {self.plan.index} selects nothing")
        return self.plan.selection.score

    @property
    def places(self) -> int:
        """Entries a row, encoded or not."""
        return self.body + self.capacity

    @property
    def every(self) -> int:
        """Decoded tokens between two selections; 0: none after the prefill."""
        return self.plan.selection.schedule.decode_every if self.plan.selection else 0


def rooms(plan: Plan, limits: Limits) -> list[Room]:
    """The room of every layer that owns a cache. Selections must be static (see `refuse`)."""
    return [_room(plan, p, limits) for p in plan.owners]


def _room(plan: Plan, p: LayerPlan, limits: Limits) -> Room:
    room = _plain(plan, p, limits)
    if not room.coded:
        return room
    # the longest tail: what no settling encodes, and the tokens until the next one
    tail = p.storage.residual + p.storage.block + FLUSH
    return replace(room, capacity=min(room.capacity, tail), body=p.storage.encoded(room.capacity))


def _plain(plan: Plan, p: LayerPlan, limits: Limits) -> Room:
    s = p.selection
    if s is None:
        if p.sliding_window and p.sliding_window < limits.tokens:
            return Room(p, p.sliding_window, ring=True)
        return Room(p, limits.tokens)
    if s.allocation.traceable:
        return _shared(p, s, limits)
    every = s.schedule.decode_every
    longest = limits.tokens if every else limits.prompt
    kept = tuple(kept_of(plan, p, t) for t in range(longest + 1))
    capacity = max(map(max, kept)) + (every or limits.new)
    window = queries_needed(s) if every else 0
    return Room(
        p, min(capacity, limits.tokens), kept, tuple(_recent(p, s, t) for t in range(longest + 1)), False, window
    )


def _shared(p: LayerPlan, s: Selection, limits: Limits) -> Room:
    spans = [p.span(t) for t in range(limits.prompt + 1)]
    budgets, floors = zip(*(s.resolve(n) if n else (0, 0) for n in spans), strict=True)
    kept = tuple((p.kv_heads * min(budget, n),) for budget, n in zip(budgets, spans, strict=True))
    recent = tuple(_recent(p, s, t) for t in range(limits.prompt + 1))
    return Room(p, max(n for (n,) in kept) + p.kv_heads * limits.new, kept, recent, floors=floors)


def kept_of(plan: Plan, p: LayerPlan, tokens: int) -> tuple[int, ...]:
    """Entries per KV head that the selection of a layer leaves of `tokens`, as `compress` does it."""
    span, s = p.span(tokens), p.selection
    if tokens == 0 or s is None or (s.budget is not None and s.resolve(span)[0] >= span):
        return (span,) * p.kv_heads
    kept = plan.kept(p.index, tokens)
    if kept is None:
        raise ValueError(f"layer {p.index}: what stays depends on the input")
    return tuple(min(n, span) for n in kept)


def _recent(p: LayerPlan, s: Selection, tokens: int) -> int:
    span = p.span(tokens)
    return s.protected(s.budget.of(span) if s.budget is not None and span else span)[1]


def queries_needed(s: Selection) -> int:
    """The newest queries that a selection must remember; a score that wants all of them has counted each as it came."""
    return s.score.queries or 0
