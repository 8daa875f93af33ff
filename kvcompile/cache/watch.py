"""What a selection remembers of one layer between two looks: recent queries, carried values, query moments."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompile.observe import Moments

EXCLUDED_FROM_MOMENTS = 4  # the first tokens are attention sinks; their queries are unlike all others


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
    def least(self) -> int:
        """Real queries that every sequence has here."""
        return self.queries.shape[2] if self.valid is None else int(self.valid.sum(1).min())


@dataclass
class Watch:
    """State of one layer's selection: aligned with the cache's rows, follows it through reorder, select and crop."""

    segments: list[Segment] = field(default_factory=list)
    carried: list[Tensor] | None = None  # per sequence [H_kv, n], aligned with the entries held
    waiting: list[bool] | None = None  # sequences whose prompt has got tokens since the last look
    counts: list[int] | None = None
    totals: Tensor | None = None  # [B, H_q, D] float64
    outers: Tensor | None = None  # [B, H_q, D, D] float64

    def remember(self, queries: Tensor, positions: Tensor, valid: Tensor | None, keep: int | None) -> None:
        """Add queries; hold only the newest `keep` real ones (None: all since `forget`)."""
        if keep is not None and queries.shape[2] > keep:
            if valid is None:
                queries, positions = queries[:, :, -keep:].clone(), positions[:, -keep:]
            else:
                newest = valid.int().sort(dim=1, stable=True).indices[:, -keep:]  # padding first, order kept
                queries = queries.take_along_dim(newest[:, None, :, None], 2)
                positions, valid = positions.take_along_dim(newest, 1), valid.take_along_dim(newest, 1)
        self.segments.append(Segment(queries, positions, valid))
        if keep is not None:
            self._hold(keep)

    def _hold(self, keep: int) -> None:
        held = sum(s.least for s in self.segments)
        while self.segments and held - self.segments[0].least >= keep:
            held -= self.segments.pop(0).least

    def counted(self, keep: int) -> None:
        """All remembered queries have been counted; hold the newest `keep` for other readers."""
        for s in self.segments:
            s.counted = True
        self._hold(keep)

    def forget(self) -> None:
        """Drop the remembered queries."""
        self.segments = []

    def arrive(self, valid: Tensor | None, batch: int, due: bool) -> list[bool]:
        """A piece of the prompts has come: which sequences a look would be about (others got padding only)."""
        came = [True] * batch if valid is None else [bool(v) for v in valid.any(1)]
        waiting = [new or old for new, old in zip(came, self.waiting or [False] * batch, strict=True)]
        self.waiting = None if due else waiting
        return waiting

    def recall(self, b: int, heads: int, keep: int | None) -> tuple[Tensor, Tensor]:
        """Newest queries of one sequence `[H_kv, g, W, D]` and true positions `[W]`, oldest first, without padding.

        `keep` None: all that have not been counted.
        """
        queries, positions = [], []
        for s in self.segments:
            if keep is None and s.counted:
                continue
            real = slice(None) if s.valid is None else s.valid[b]
            queries.append(s.queries[b][:, real])
            positions.append(s.positions[b][real])
        joined, at = torch.cat(queries, 1), torch.cat(positions)
        if keep is not None:
            joined, at = joined[:, max(0, joined.shape[1] - keep) :], at[max(0, at.shape[0] - keep) :]
        return joined.view(heads, joined.shape[0] // heads, *joined.shape[1:]), at

    def add_moments(self, queries: Tensor, positions: Tensor, valid: Tensor | None) -> None:
        """Add queries before rotation `[B, H_q, Q, D]` to the running sums."""
        batch, heads, _, dim = queries.shape
        if self.counts is None or self.totals is None or self.outers is None:
            self.counts = [0] * batch
            self.totals = torch.zeros(batch, heads, dim, dtype=torch.float64, device=queries.device)
            self.outers = torch.zeros(batch, heads, dim, dim, dtype=torch.float64, device=queries.device)
        for b in range(batch):
            mine = _counting(queries[b], positions[b], None if valid is None else valid[b]).float()
            self.counts[b] += mine.shape[1]
            self.totals[b] += mine.sum(1)
            self.outers[b] += mine.mT @ mine

    def moments(self, b: int, heads: int) -> Moments | None:
        """Mean and covariance of one sequence's queries before rotation, or None where none was seen."""
        if self.counts is None or self.totals is None or self.outers is None or not self.counts[b]:
            return None
        mean = self.totals[b] / self.counts[b]
        covariance = torch.baddbmm(  # E[q q^T] - mean mean^T
            self.outers[b], mean.unsqueeze(-1), mean.unsqueeze(-2), beta=1 / self.counts[b], alpha=-1
        )
        by_head = [torch.unflatten(x.float(), 0, (heads, -1)) for x in (mean, covariance)]
        return Moments(self.counts[b], *by_head)

    def carry(self, b: int, entries: int) -> Tensor | None:
        """Carried values of one sequence, with zeros for the entries that came since, `[H_kv, entries]`."""
        if self.carried is None:
            return None
        held = self.carried[b]
        return torch.nn.functional.pad(held, (0, entries - held.shape[1]))

    def select(self, sequences: Tensor) -> None:
        """Follow the cache when its sequences are kept, repeated or reordered."""
        chosen = [int(b) for b in sequences]
        for s in self.segments:
            s.queries, s.positions = s.queries[sequences], s.positions[sequences]
            s.valid = None if s.valid is None else s.valid[sequences]
        if self.carried is not None:
            self.carried = [self.carried[b] for b in chosen]
        if self.waiting is not None:
            self.waiting = [self.waiting[b] for b in chosen]
        if self.counts is not None and self.totals is not None and self.outers is not None:
            self.counts = [self.counts[b] for b in chosen]
            self.totals, self.outers = self.totals[sequences], self.outers[sequences]


def _counting(queries: Tensor, positions: Tensor, valid: Tensor | None) -> Tensor:
    """Those of one sequence's queries `[H_q, Q, D]` that count for its moments; without padding, a view."""
    if valid is None:
        return queries[:, max(0, EXCLUDED_FROM_MOMENTS - int(positions[0])) :]
    return queries[:, valid & (positions >= EXCLUDED_FROM_MOMENTS)]
