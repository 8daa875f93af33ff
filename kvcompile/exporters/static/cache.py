"""The cache of a program: what the nodes of a compiled graph call in place of `KVCache`, in fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.exporters.static import shared_rows
from kvcompile.exporters.static.attention import causal, masked
from kvcompile.exporters.static.capacity import Room
from kvcompile.exporters.static.quantized import codes_of, encoded, entries_of, flush, format_of, split
from kvcompile.exporters.static.selection import (
    BatchScores,
    Entries,
    Inputs,
    allotted,
    masses,
    query_moments,
    score_entries,
)
from kvcompile.graph import ops
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import FLUSH
from kvcompile.runtime.attention import Expansion, per_head
from kvcompile.runtime.cache import Rotary
from kvcompile.runtime.selection import highest_padded
from kvcompile.stores.encoded.hadamard import turn_basis

State = dict[str, Tensor]
Tables = Mapping[str, Tensor]


def empty(plan: Plan, rooms: Sequence[Room], batch: int, device: torch.device | str = "cpu") -> State:
    """A cache that holds nothing, in the order of a program's arguments.

    clock `[2]`: tokens seen, and decoded since the prompt. Per owner layer: keys and values `[B, H_kv, C, D]` (of a
    latent, keys alone: its rows), true positions `[B, H_kv, C]` (-1 where empty), entries `[B, H_kv]` and, where a
    selection wants them, newest queries; where older entries are encoded, codes, scales, positions and number of those;
    what a score carries. Where heads share a row, whose each entry `[B, 1, C]` is.
    """
    dtype = getattr(torch, plan.dtype)
    state = {"clock": torch.zeros(2, dtype=torch.int64, device=device)}
    for room in rooms:
        p, shape = room.plan, (batch, room.rows, room.capacity)
        for name, dim in (("keys", p.key_dim), ("values", p.value_dim))[: 1 if p.latent else 2]:
            state[f"{name}_{p.index}"] = torch.zeros(*shape, dim, dtype=dtype, device=device)
        state[f"positions_{p.index}"] = torch.full(shape, -1, dtype=torch.int32, device=device)
        state[f"entries_{p.index}"] = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        if room.shared:
            state[f"heads_{p.index}"] = torch.zeros(shape, dtype=torch.int32, device=device)
        if room.codes:
            n = room.codes + p.storage.block  # the spare block takes what is not to be written
            spare = torch.zeros(*shape[:2], n, p.head_dim, dtype=dtype, device=device)
            nowhere = torch.full((*shape[:2], n), -1, dtype=torch.int32, device=device)
            codes = codes_of(Entries(spare, spare, nowhere), format_of(room, dtype))
            state.update({f"{name}_{p.index}": x for name, x in codes.items()})
            state[f"encoded_{p.index}"] = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        if room.every and room.score.needs.carries:
            state[f"carried_{p.index}"] = torch.zeros(shape, device=device, dtype=torch.float32)
        if room.window > 1:
            heads = sum(q.query_heads for q in plan.layers if q.owner == p.index)
            state[f"queries_{p.index}"] = torch.zeros(batch, heads, room.window, p.key_dim, dtype=dtype, device=device)
    return state


@dataclass(frozen=True)
class Layer:
    """One owner layer at one pass: its entries, and where they are kept."""

    room: Room
    entries: Entries


class PrefillCache:
    """A whole prompt at once: attention is that of a prompt to itself, and what stays of it becomes the state."""

    def __init__(
        self, plan: Plan, rooms: Sequence[Room], tables: Tables, rotaries: Sequence[Rotary], ids: Tensor
    ) -> None:
        self.plan, self.rooms, self.tables, self.rotaries = plan, {r.plan.index: r for r in rooms}, tables, rotaries
        self.batch, self.count = ids.shape
        self.positions = torch.arange(self.count, device=ids.device, dtype=torch.int64)
        self.seen = torch.full((1,), self.count, dtype=torch.int64, device=ids.device)
        self.state: State = {"clock": torch.cat((self.seen, torch.zeros_like(self.seen)))}

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Layer:
        """New keys and values `[B, H_kv, T, D]`; a layer without a selection keeps them all, or its window."""
        at = self.positions.to(torch.int32).expand(*keys.shape[:2], -1)
        kv = Layer(self.rooms[layer], Entries(keys, _values(self.rooms[layer].plan, keys, values), at))
        if kv.room.plan.selection is None:
            self._store(kv, self._newest(kv) if kv.room.ring else self._all(kv), self.seen)
        return kv

    def attend(self, p: LayerPlan, queries: Tensor, kv: Layer, expansion: Expansion | None = None) -> Tensor:
        """Causal attention of the prompt to itself; latents are expanded to heads."""
        if expansion is None:
            return causal(p, queries, kv.entries.keys, kv.entries.values, self.positions)
        heads = expansion.heads(queries, kv.entries.keys)
        return causal(p, *heads, self.positions)[..., : expansion.up.shape[1]]

    def observe(self, kv: Layer, queries: Tensor, unrotated: Tensor) -> BatchScores:
        """Scores of every entry for the queries `[B, H_q, T, D]` of all readers."""
        room, needs = kv.room, kv.room.score.needs
        last, at = self._last(queries, needs.queries)
        if room.window > 1:
            self.state[f"queries_{room.plan.index}"] = last
        inputs = Inputs(
            last,
            at,
            self.seen,
            self.tables[f"recent_{room.plan.index}"][self.seen],
            query_moments(room.plan, unrotated, self.positions, needs.moments) if needs.moments else None,
            lambda horizon: self._mean_rotation(room.plan, horizon),
        )
        scores = score_entries(room.plan, kv.entries, inputs)
        if room.measure is None:
            return scores
        last, at = self._last(queries, room.measure.needs.queries)
        inputs = replace(inputs, queries=last, positions=at)
        return replace(scores, mass=masses(room.plan, kv.entries, inputs, room.measure))

    def _last(self, queries: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The prompt's last queries, and their positions; before its start stand queries at -1, which see nothing."""
        if window is None:
            return queries, self.positions
        last = F.pad(queries, (0, 0, window, 0))[:, :, self.count :]
        return last, F.pad(self.positions, (window, 0), value=-1)[self.count :]

    def _mean_rotation(self, p: LayerPlan, horizon: int) -> Tensor:
        """The rotation `[D, D]` of row vectors, averaged over the next `horizon` positions."""
        rotary, dim = self.rotaries[p.index], p.key_dim
        cos, sin = (
            x.float().mean(0)
            for x in rotary(self.seen + torch.arange(horizon, device=self.seen.device, dtype=torch.int64))
        )
        whole = torch.eye(dim, device=self.seen.device, dtype=torch.float32).view(1, 1, dim, dim)
        rotation: Tensor = ops.rope(whole, cos.expand(1, dim, -1), sin.expand(1, dim, -1))[0, 0]
        return turn_basis(rotation) if p.storage.rotated else rotation

    def keep(self, scores: Mapping[int, tuple[Layer, BatchScores]]) -> None:
        """What the selections of these layers leave of the prompt; those given together share one budget."""
        counts = self._counts(scores)
        for layer, (kv, of_layer) in scores.items():
            if kv.room.shared:
                self._split(kv, of_layer.scores, counts[layer])
                continue
            order = highest_padded(of_layer.scores, counts[layer], kv.room.places)
            self._store(kv, order, counts[layer])
            if of_layer.carried is not None and kv.room.every:
                self.state[f"carried_{layer}"] = F.pad(of_layer.carried, (0, 1)).gather(2, order)

    def _counts(self, scores: Mapping[int, tuple[Layer, BatchScores]]) -> dict[int, Tensor]:
        """Entries of every head, `[H_kv]` or `[B, H_kv]`, for each layer."""
        known = {i: kv.room for i, (kv, _) in scores.items() if kv.room.kept}
        counts = {i: self.tables[f"kept_{i}"][self.seen].squeeze(0) for i in known}
        rest = {i: of_layer for i, (_, of_layer) in scores.items() if i not in known}
        if rest:
            budgets = {i: tuple(self.tables[f"{name}_{i}"][self.seen] for name in ("budget", "floor")) for i in rest}
            counts |= allotted(scores[next(iter(rest))][0].room.allocation, budgets, rest)
        return counts

    def _split(self, kv: Layer, ranked: Tensor, counts: Tensor) -> None:
        kept, heads = shared_rows.split(kv.room, kv.entries, ranked, counts)
        tensors = {"keys": kept.keys, "positions": kept.positions, "heads": heads}
        if kv.room.plan.latent is None:
            tensors["values"] = kept.values
        tensors["entries"] = counts.sum(1, keepdim=True)
        self.state.update({f"{name}_{kv.room.plan.index}": x for name, x in tensors.items()})

    def trim(self, kv: Layer) -> None:
        """Nothing: rings hold no more than the window."""

    def flush(self, kv: Layer) -> None:
        """Nothing: what was stored is flushed."""

    def _all(self, kv: Layer) -> Tensor:
        places = torch.arange(kv.room.places, device=self.seen.device, dtype=torch.int64)
        return torch.where(places < self.seen, places, self.count).expand(*kv.entries.positions.shape[:2], -1)

    def _newest(self, kv: Layer) -> Tensor:
        """Place s holds the last position that is s modulo the capacity."""
        places = torch.arange(kv.room.capacity, device=self.seen.device, dtype=torch.int64)
        last = self.seen - 1
        at = last - (last - places) % kv.room.capacity
        return torch.where(at >= 0, at, self.count).expand(*kv.entries.positions.shape[:2], -1)

    def _store(self, kv: Layer, order: Tensor, counts: Tensor) -> None:
        """Keep the entries `order [B, H_kv, m]`, the first `counts` (per head, or of all) of which are there."""
        tensors, counts = State(), counts.expand(order.shape[:2])
        if kv.room.codes:
            tensors, order, old = split(kv.room, kv.entries, order, counts)
            tensors["encoded"], counts = old, counts - old
        kept = kv.entries.at(order)
        tensors.update(keys=kept.keys, positions=kept.positions, entries=counts.clone())
        if kv.room.plan.latent is None:
            tensors["values"] = kept.values
        self.state.update({f"{name}_{kv.room.plan.index}": x for name, x in tensors.items()})


class DecodeCache:
    """One new token a pass: the state is changed in place."""

    def __init__(self, plan: Plan, rooms: Sequence[Room], tables: Tables, state: State) -> None:
        self.plan, self.rooms, self.tables, self.state = plan, {r.plan.index: r for r in rooms}, tables, state
        self.before = state["clock"][:1].clone()  # the position of the new token
        state["clock"].add_(1)
        self.seen, self.tick = state["clock"][:1], state["clock"][1:]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Layer:
        """A new token's keys and values `[B, H_kv, 1, D]`."""
        room, tensors = self.rooms[layer], self._of(layer)
        if room.shared:
            return self._appended(room, tensors, keys, values)
        entries = tensors["entries"]
        place = (self.before % room.capacity).expand_as(entries) if room.ring else entries
        batch, heads = entries.shape
        rows = (
            torch.arange(batch, device=entries.device, dtype=torch.int64).unsqueeze(1),
            torch.arange(heads, device=entries.device, dtype=torch.int64),
        )
        new = {"keys": keys.squeeze(2), "values": values.squeeze(2), "positions": self.before.to(torch.int32)}
        for name, x in new.items():
            if name in tensors:
                tensors[name].index_put_((*rows, place), x if x.ndim > 1 else x.expand(batch, heads))
        entries.add_(1)
        return Layer(room, entries_of(room, tensors, _newest(room, tensors)))

    def _appended(self, room: Room, tensors: State, keys: Tensor, values: Tensor) -> Layer:
        at = self.before.to(torch.int32).expand(keys.shape[:2])
        heads = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device).expand(at.shape)
        new = {"keys": keys.squeeze(2), "values": values.squeeze(2), "positions": at, "heads": heads}
        shared_rows.append(tensors, {name: x for name, x in new.items() if name in tensors})
        return Layer(room, _newest(room, tensors))

    def attend(self, p: LayerPlan, queries: Tensor, kv: Layer, expansion: Expansion | None = None) -> Tensor:
        """Attention of the new token to every entry that is there and in its window; of latents, absorbed."""
        at = kv.entries.positions
        visible = at >= 0
        if p.sliding_window:
            visible = visible & (at > self.before - p.sliding_window)
        if kv.room.shared:
            heads = self.state[f"heads_{kv.room.plan.index}"]
            visible = shared_rows.visible(heads, visible, p.group, p.kv_heads)
        else:
            visible = visible.unsqueeze(2)
        out = masked(p, queries, kv.entries.keys, kv.entries.values, visible)
        return out if expansion is None else per_head(out, expansion.up)

    def observe(self, kv: Layer, queries: Tensor, unrotated: Tensor) -> BatchScores | None:
        """Scores `[B, H_kv, C]`; None where nothing is ever dropped while decoding."""
        p, room = kv.room.plan, kv.room
        if not room.every:
            return None
        wanted = room.score.needs.queries
        window = 1 if wanted is None else wanted
        if room.window > 1:
            remembered = self.state[f"queries_{p.index}"]
            remembered.copy_(torch.cat((remembered[:, :, 1:], queries), 2))
            queries = remembered
        at = (self.before + torch.arange(1 - window, 1, device=queries.device, dtype=torch.int64)).clamp(min=-1)
        recent = self.tables[f"recent_{p.index}"][self.seen]
        carried = self.state.get(f"carried_{p.index}")
        return score_entries(p, kv.entries, Inputs(queries[:, :, :window], at, self.seen, recent, carried=carried))

    def keep(self, scores: Mapping[int, tuple[Layer, BatchScores | None]]) -> None:
        """What the selections leave, where one is due; otherwise everything moves to where it was."""
        for layer, (kv, of_layer) in scores.items():
            if of_layer is None:
                continue
            ranked, carried = of_layer.scores, of_layer.carried
            tensors, room = self._of(layer), kv.room
            due = self.tick % room.every == 0
            counts = self.tables[f"kept_{layer}"][self.seen].squeeze(0)
            same = torch.arange(room.capacity, device=due.device, dtype=torch.int64)
            order = torch.where(due, highest_padded(ranked, counts, room.capacity), same)
            _replace(tensors, kv.entries.at(order), torch.where(due, counts, tensors["entries"]))
            if carried is not None:
                tensors["carried"].copy_(F.pad(carried, (0, 1)).gather(2, order.expand_as(carried)))

    def trim(self, kv: Layer) -> None:
        """Nothing: rings hold no more than the window."""

    def flush(self, kv: Layer) -> None:
        """Encode what is older than the residual when it is this layer's turn (see `kvcompile.graph.ops.flush`)."""
        room, tensors = kv.room, self._of(kv.room.plan.index)
        if not room.codes:
            return
        due = (self.tick + room.plan.index) % FLUSH == 0
        counts = torch.where(due, encoded(room, tensors["entries"]), 0)
        residual = _newest(room, tensors)
        flush(room, tensors, residual, counts)
        order = torch.arange(room.capacity, device=due.device, dtype=torch.int64) + counts.unsqueeze(-1)
        _replace(tensors, residual.at(order.clamp(max=room.capacity)), tensors["entries"] - counts)

    def _of(self, layer: int) -> State:
        """The tensors of one layer, by their names without its number."""
        end = f"_{layer}"
        return {name.removesuffix(end): x for name, x in self.state.items() if name.endswith(end)}


def _newest(room: Room, tensors: State) -> Entries:
    """The entries in the model's dtype."""
    return Entries(tensors["keys"], _values(room.plan, tensors["keys"], tensors.get("values")), tensors["positions"])


def _values(p: LayerPlan, keys: Tensor, values: Tensor | None) -> Tensor:
    """The values; those of a latent are the end of its rows."""
    if p.latent is not None:
        return keys[..., p.latent.rope :]
    if values is None:
        raise RuntimeError(f"layer {p.index} holds keys without values")
    return values


def _replace(tensors: State, entries: Entries, count: Tensor) -> None:
    for name, new in (("keys", entries.keys), ("values", entries.values), ("positions", entries.positions)):
        if name in tensors:
            tensors[name].copy_(new)
    tensors["entries"].copy_(count)
