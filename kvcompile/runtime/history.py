"""What a selection remembers of one layer between two selections: recent queries, carried values, query moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompile.runtime.observation import Moments
from kvcompile.runtime.selection import EXCLUDED_FROM_MOMENTS, in_moments, moments
from kvcompile.stores.encoded.tier import Received


@dataclass
class Segment:
    """Rotated queries `[B, H_q, Q, D]` of consecutive tokens at true positions `[B, Q]`; `valid [B, Q]` or None.

    `counted`: a score that sums over all queries has seen them already.
    """

    queries: Tensor
    positions: Tensor
    valid: Tensor | None
    counted: bool = False

    @property
    def real(self) -> int | Tensor:
        """Real queries that every sequence has here, or those of each, `[B]`."""
        return self.queries.shape[2] if self.valid is None else self.valid.sum(1)

    def cut(self, keep: int) -> None:
        """Hold the newest `keep` real queries of each sequence."""
        if self.queries.shape[2] <= keep:
            return
        if self.valid is None:
            self.queries, self.positions = self.queries[:, :, -keep:].clone(), self.positions[:, -keep:]
            return
        newest = self.valid.int().sort(dim=1, stable=True).indices[:, -keep:]  # padding first, order kept
        self.queries = self.queries.take_along_dim(newest[:, None, :, None], 2)
        self.positions, self.valid = (x.take_along_dim(newest, 1) for x in (self.positions, self.valid))


@dataclass(frozen=True)
class Sums:
    """Number of queries before rotation, their sum `[H_q, D]` and that of q^T q, `[H_q, D, D]`, float32."""

    count: int
    total: Tensor
    outer: Tensor

    def plus(self, new: Sums) -> Sums:
        """The sums over both."""
        return Sums(self.count + new.count, self.total + new.total, self.outer + new.outer)


@dataclass
class QueryHistory:
    """State of one layer's selection: aligned with the cache's rows, follows it through reorder, select and crop."""

    segments: list[Segment] = field(default_factory=list)
    carried: list[Tensor] | None = None  # per sequence [H_kv, n], aligned with the entries held
    waiting: list[bool] | None = None  # sequences whose prompt has got tokens since the last selection
    sums: list[Sums] | None = None  # per sequence
    sinks: Tensor | None = None  # [H_q] logits of the query heads, where attention has sinks
    pending: list[int] | None = None  # of each sequence, the newest counted queries that wait for their chunk's end
    received: dict[int, list[Received]] = field(default_factory=dict)  # by sequence, of each row, for its new tiers
    column_sums: Tensor | None = None  # [B, H_kv, n or more] attention to the entries held, summed by the kernel

    def remember(
        self, queries: Tensor, positions: Tensor, valid: Tensor | None, keep: int | None, counted: bool = False
    ) -> None:
        """Add the queries of a pass.

        Args:
            queries: `[B, H_q, Q, D]`, as they met the keys.
            positions: `[B, Q]`, their true positions.
            valid: `[B, Q]`, which are real (None: all).
            keep: only the newest so many real ones are held (None: all since `forget`).
            counted: whether a kernel has summed their attention already.
        """
        self.segments.append(Segment(queries, positions, valid, counted))
        if keep is not None:
            self.segments[-1].cut(keep)
            self._hold(keep)

    def _hold(self, keep: int) -> None:
        real = [s.real for s in self.segments]
        later: int | Tensor = sum(real)
        for count in real:
            later = later - count
            if int(later if isinstance(later, int) else later.min()) < keep:
                return
            self.segments.pop(0)

    def counted(self, keep: int, unfinished: list[int] | None = None) -> None:
        """All remembered queries have been counted; hold the newest `keep` for other readers.

        unfinished: but for so many of the newest ones of each sequence, which are counted with what comes.
        """
        for s in self.segments:
            s.counted = True
        self.column_sums, self.pending = None, unfinished
        keep = max(keep, *unfinished) if unfinished else keep
        self._hold(keep)
        if unfinished and self.segments:
            self.segments[0].cut(keep)

    def uncounted(self, b: int) -> int:
        """How many of the newest queries of one sequence a score that sums over all has yet to count."""
        real = [
            s.queries.shape[2] if s.valid is None else int(s.valid[b].sum()) for s in self.segments if not s.counted
        ]
        return sum(real) + (self.pending[b] if self.pending else 0)

    def forget(self) -> None:
        """Drop the remembered queries."""
        self.segments, self.pending = [], None

    def arrive(self, valid: Tensor | None, batch: int, due: bool) -> list[bool]:
        """A piece of the prompts has come. Returns which sequences have got tokens since the last selection.

        Args:
            valid: `[B, Q]`, which tokens of the piece are real (None: all).
            batch: B.
            due: whether a selection follows, which scores these sequences.
        """
        came = [True] * batch if valid is None else [bool(v) for v in valid.any(1)]
        waiting = [new or old for new, old in zip(came, self.waiting or [False] * batch, strict=True)]
        self.waiting = None if due else waiting
        return waiting

    def recall(self, b: int, heads: int, keep: int | None, without: int = 0) -> tuple[Tensor, Tensor]:
        """Newest queries of one sequence `[H_kv, g, W, D]` and true positions `[W]`, oldest first, without padding.

        keep: how many (None: all that have not been counted). without: but for so many of the newest.
        """
        counted_too = keep is not None or bool(self.pending and self.pending[b])
        keep = self.uncounted(b) if keep is None else keep
        queries, positions = [], []
        for s in self.segments:
            if s.counted and not counted_too:
                continue
            real = slice(None) if s.valid is None else s.valid[b]
            queries.append(s.queries[b][:, real])
            positions.append(s.positions[b][real])
        joined, at = torch.cat(queries, 1), torch.cat(positions)
        newest = slice(max(0, at.shape[0] - keep), at.shape[0] - without)
        joined, at = joined[:, newest], at[newest]
        return joined.view(heads, joined.shape[0] // heads, *joined.shape[1:]), at

    def newest(self, keep: int) -> tuple[Tensor, Tensor] | None:
        """Newest queries of all sequences together, `[B, H_q, W, D]`, and true positions `[B, W]`, W <= keep.

        None where padding lies between them: sequences have them at different places then.
        """
        if not self.segments or any(s.valid is not None for s in self.segments):
            return None
        queries = torch.cat([s.queries for s in self.segments], 2)
        positions = torch.cat([s.positions for s in self.segments], 1)
        return queries[:, :, -keep:], positions[:, -keep:]

    def add_moments(self, queries: Tensor, positions: Tensor, valid: Tensor | None, stride: int = 1) -> None:
        """Add the queries before rotation `[B, H_q, Q, D]` whose position `stride` divides to the running sums."""
        real = [None] * queries.shape[0] if valid is None else valid
        new = [_sums(*sequence, stride) for sequence in zip(queries, positions, real, strict=True)]
        self.sums = new if self.sums is None else [a.plus(b) for a, b in zip(self.sums, new, strict=True)]

    def moments(self, b: int, heads: int) -> Moments | None:
        """Mean and covariance of one sequence's queries before rotation, or None where none was seen."""
        if self.sums is None or not self.sums[b].count:
            return None
        return moments(self.sums[b].count, self.sums[b].total, self.sums[b].outer, heads)

    def carry(self, b: int, entries: int) -> Tensor | None:
        """Carried values of one sequence, with zeros for the entries that came since, `[H_kv, entries]`."""
        if self.carried is None:
            return None
        carried = self.carried[b]
        return torch.nn.functional.pad(carried, (0, entries - carried.shape[1]))

    def recount(self, b: int, batch: int, entries: Tensor, numbers: Tensor) -> None:
        """Carry other `numbers`, row after row, for the `entries [H_kv, n]` (bool) of sequence b, one of `batch`."""
        if self.carried is None:
            self.carried = [numbers.new_zeros(len(entries), 0)] * batch
        carried = self.carried[b].new_zeros(entries.shape)
        carried[:, : self.carried[b].shape[1]] = self.carried[b]
        carried[entries] = numbers
        self.carried[b] = carried

    def receive(self, batch: int, heads: int, entries: int, room: int, device: torch.device) -> Tensor:
        """Where a kernel adds up the attention that entries receive, to what is there: float32 `[B * H_kv, entries]`.

        Args:
            batch: B.
            heads: H_kv.
            entries: of the longest row.
            room: for how many more there is room before it is copied.
            device: that of the cache.
        """
        known = 0 if self.column_sums is None else self.column_sums.shape[2]
        if known < entries:
            wide = torch.zeros(batch, heads, entries + room, device=device, dtype=torch.float32)
            if self.column_sums is not None:
                wide[:, :, :known] = self.column_sums
            self.column_sums = wide
        return torch.flatten(self.column_sums, 0, 1)[:, :entries]  # type: ignore[arg-type]

    def gained(self, b: int, entries: int, group: int) -> Tensor | None:
        """What the kernel has summed for one sequence, mean over the `group` query heads of a KV head."""
        return None if self.column_sums is None else self.column_sums[b, :, :entries] / group

    def keep(self, indices: list[Tensor], heads: int, longest: int) -> None:
        """Follow the cache when it keeps only some entries.

        Args:
            indices: of each row (sequence-major) the entries that stay, ascending.
            heads: KV heads, the rows of one sequence.
            longest: entries of the longest row before.
        """

        def kept(b: int, state: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(state, (0, max(0, longest - state.shape[1])))
            rows = [padded[h, indices[b * heads + h]] for h in range(heads)]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        if self.carried is not None:
            self.carried = [kept(b, state) for b, state in enumerate(self.carried)]
        if self.column_sums is not None:
            rows = [kept(b, state).T for b, state in enumerate(self.column_sums)]
            self.column_sums = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()

    def select(self, sequences: Tensor) -> None:
        """Follow the cache when its sequences are kept, repeated or reordered."""
        chosen = [int(b) for b in sequences]
        for s in self.segments:
            s.queries, s.positions = s.queries[sequences], s.positions[sequences]
            s.valid = None if s.valid is None else s.valid[sequences]
        if self.carried is not None:
            self.carried = [self.carried[b] for b in chosen]
        if self.column_sums is not None:
            self.column_sums = self.column_sums[sequences]
        if self.waiting is not None:
            self.waiting = [self.waiting[b] for b in chosen]
        if self.sums is not None:
            self.sums = [self.sums[b] for b in chosen]
        if self.pending is not None:
            self.pending = [self.pending[b] for b in chosen]


def _sums(queries: Tensor, positions: Tensor, valid: Tensor | None, stride: int) -> Sums:
    """Sums over those of one sequence's queries `[H_q, Q, D]` that count; without padding, no copy of them is made."""
    if valid is None:
        here = int(positions[0])
        first = max(here, EXCLUDED_FROM_MOMENTS)
        chosen = queries[:, first + -first % stride - here :: stride].float()
    else:
        chosen = queries[:, valid & in_moments(positions, stride)].float()
    outer = chosen.mT @ chosen
    return Sums(chosen.shape[1], chosen.sum(1), outer)
