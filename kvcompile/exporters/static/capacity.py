"""How many entries a layer keeps of how many tokens, as tables that a program can look up, and the room it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.selection import Demand
from kvcompile.plan.storage import FLUSH

if TYPE_CHECKING:
    from kvcompile.plan.selection import Allocation, Score, Selection


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

    kept `[t][h]`: entries per head that stay of `t` tokens, where that follows from `t`; else budgets and floors `[t]`:
    what a head keeps on average, and at least. recent `[t]`: newest tokens among them (all of a selection only).
    ring: entry of position p lies at p % capacity, so that a new token replaces the one that left the window.
    window: newest queries that the selection looks at again while decoding (0: none, or the last one alone).
    codes: encoded entries a row, which come before the others; a multiple of the storage's block.
    shared: all heads share one row, which says of every entry whose it is.
    """

    plan: LayerPlan
    capacity: int
    kept: tuple[tuple[int, ...], ...] = ()
    budgets: tuple[int, ...] = ()
    floors: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    ring: bool = False
    window: int = 0
    codes: int = 0
    shared: bool = False

    @property
    def tables(self) -> dict[str, tuple[object, ...]]:
        """What a program looks up by tokens seen."""
        named = {"kept": self.kept, "budget": self.budgets, "floor": self.floors, "recent": self.recent}
        return {name: table for name, table in named.items() if table}

    @property
    def rows(self) -> int:
        """Rows of a sequence."""
        return 1 if self.shared else self.plan.kv_heads

    @property
    def quantized(self) -> bool:
        """Whether older entries are encoded."""
        return self.plan.storage.quantized

    @property
    def score(self) -> Score:
        """How the selection ranks entries."""
        if self.plan.selection is None:
            raise RuntimeError(f"layer {self.plan.index} selects nothing")
        return self.plan.selection.score

    @property
    def allocation(self) -> Allocation:
        """How the selection splits a budget."""
        if self.plan.selection is None:
            raise RuntimeError(f"layer {self.plan.index} selects nothing")
        return self.plan.selection.allocation

    @property
    def measure(self) -> Score | None:
        """How the selection measures uncertainty (None: it does not)."""
        return self.plan.selection.uncertainty if self.plan.selection else None

    @property
    def places(self) -> int:
        """Entries a row, encoded or not."""
        return self.codes + self.capacity

    @property
    def every(self) -> int:
        """Decoded tokens between two selections; 0: none after the prefill."""
        return self.plan.selection.schedule.decode_every if self.plan.selection else 0


def rooms(plan: Plan, limits: Limits) -> list[Room]:
    """The room of every layer that owns a cache. Selections must be static (see `refuse`)."""
    return [_room(plan, p, limits) for p in plan.owners]


def _room(plan: Plan, p: LayerPlan, limits: Limits) -> Room:
    room = _plain(plan, p, limits)
    if not room.quantized:
        return room
    # the longest residual: what no flush encodes, and the tokens until the next one
    residual = p.storage.residual + p.storage.block + FLUSH
    return replace(room, capacity=min(room.capacity, residual), codes=p.storage.encoded(room.capacity))


def _plain(plan: Plan, p: LayerPlan, limits: Limits) -> Room:
    s = p.selection
    if s is None:
        if p.sliding_window and p.sliding_window < limits.tokens:
            return Room(p, p.sliding_window, ring=True)
        return Room(p, limits.tokens)
    if s.allocation.traits.traceable:
        return _allotted(plan, p, s, limits)
    every = s.schedule.decode_every
    longest = limits.tokens if every else limits.prompt
    kept = tuple(kept_of(plan, p, t) for t in range(longest + 1))
    capacity = max(map(max, kept)) + (every or limits.new)
    window = queries_needed(s) if every else 0
    recent = tuple(_recent(p, s, t) for t in range(longest + 1))
    return Room(p, min(capacity, limits.tokens), kept, recent=recent, window=window)


def _allotted(plan: Plan, p: LayerPlan, s: Selection, limits: Limits) -> Room:
    traits = s.allocation.traits
    peers = [q for q in plan.selected if q.selection == s] if traits.cross_layer else [p]  # those who share the budget
    demands = [[_demand(q, t) for q in peers] for t in range(limits.prompt + 1)]
    place = peers.index(p)
    most = max(s.allocation.most(layers)[place] for layers in demands)
    shared = traits.competing and most < p.span(limits.prompt)  # else any head has room for everything
    return Room(
        p,
        (most + limits.new) * (p.kv_heads if shared else 1),
        budgets=tuple(layers[place].budget for layers in demands),
        floors=tuple(layers[place].floor for layers in demands),
        recent=tuple(_recent(p, s, t) for t in range(limits.prompt + 1)),
        shared=shared,
    )


def _demand(p: LayerPlan, tokens: int) -> Demand:
    span, s = p.span(tokens), p.selection
    budget, floor = s.resolve(span) if s is not None and span else (0, 0)
    return Demand(p.kv_heads, min(budget, span), floor, span)


def kept_of(plan: Plan, p: LayerPlan, tokens: int) -> tuple[int, ...]:
    """Entries per KV head that the selection of a layer leaves of `tokens`, as `compress` does it."""
    span, s = p.span(tokens), p.selection
    if tokens == 0 or s is None or s.spares(span):
        return (span,) * p.kv_heads
    kept = plan.kept(p.index, tokens)
    if kept is None:
        raise ValueError(f"layer {p.index}: what stays depends on the input")
    return tuple(min(n, span) for n in kept)


def _recent(p: LayerPlan, s: Selection, tokens: int) -> int:
    return s.always(p.span(tokens))[1]


def queries_needed(s: Selection) -> int:
    """The newest queries that a selection must remember; a score that wants all of them has counted each as it came."""
    return s.score.needs.queries or 0
