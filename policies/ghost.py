"""Ghost: the context's own queries, turned on past its end, look back for what a later reader would miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcompile.plan.ghost import GhostRule
from kvcompile.plan.selection import Needs, Score
from kvcompile.policies.base import CarriedScore, SelectionPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from kvcompile.runtime.observation import Observation


@dataclass(frozen=True)
class GhostReplay(CarriedScore):
    """The change that dropping an entry makes to the outputs of ghosts: queries of the context, turned on by `shift`.

    Reading a text once more, each token finds its first copy, and what followed. The query of the first reading says
    already "I am this token"; only its position is another, and rotations compose: q'_t = q_t R(shift). Of a token t in
    the chunk C, the sinks and all of C are looked at again, beside what t attended to in C at first (without the sinks,
    which exist once):

        Z_t  = sum over j in sinks and C of exp(c q'_t k_j) + sum over i in C, sinks <= i <= t, of exp(c q_t k_i)
        p_tj = exp(c q'_t k_j) / Z_t, and o_t the output of all these weights
        s_j  = sum over t in C, |t - j| <= band, and over the group, of (p_tj / max(1 - p_tj, 1e-6))^2 ||v_j - o_t||^2

    `kernels.reference.ghost` has it in full. In a layer with a sliding window of w, chunks have w tokens at most, and
    the shift is at most w / 2; where a layer has no rotary positions q' = q, a look that is not causal.
    Source: ours. A text that is read again finds itself: KVzip, arXiv 2505.23416; the change of the output: DropKV,
    NVIDIA/kvpress pull request 284.
    """

    shift: int
    chunk: int
    band: int
    sinks: int

    comparable = True

    @property
    def needs(self) -> Needs:
        """Every query once, by chunks."""
        return Needs(queries=None, carries=True, chunk=self.chunk or None, rotation=self.shift, traceable=False)

    def ghost_rule(self, scale: float, softcap: float | None, window: int | None) -> GhostRule:
        """Its chunks end with the window."""
        return GhostRule(self.needs.together(window) or 0, self.band, scale, softcap, self.sinks)

    def observe(self, seen: Observation) -> Tensor:
        """Scores so far, `[H_kv, n]`, with those of the tokens of the new queries; final, unless a chunk was cut."""
        import torch

        scores = torch.zeros(seen.positions.shape, device=seen.keys.device, dtype=torch.float32)
        if seen.carried is not None:
            scores += seen.carried
        if seen.query_positions.numel():
            self._add(scores, seen)
        return scores

    def _add(self, scores: Tensor, seen: Observation) -> None:
        import torch

        from kvcompile.kernels.reference.ghost import Reread

        rule = self.ghost_rule(seen.scale, seen.softcap, seen.sliding_window)
        if seen.rotation is None:
            raise RuntimeError("ghosts need a rotation")
        start, count, window = int(seen.query_positions[0]), seen.query_positions.numel(), seen.sliding_window
        first = ((seen.positions >= 0) & (seen.positions < start)).sum(1, keepdim=True)
        own = first + torch.arange(count, device=scores.device, dtype=torch.int64)
        rows = torch.arange(own.shape[0], device=own.device, dtype=torch.int64).unsqueeze(1)
        sinks = self._sinks_held(seen)
        turn = seen.rotation(min(self.shift, window // 2) if window else self.shift)
        text = Reread(
            seen.queries,
            (seen.queries.float() @ turn).to(seen.queries.dtype),
            seen.keys[rows, own],
            seen.values[rows, own],
            (seen.keys[:, :sinks], seen.values[:, :sinks]),
            start,
            seen.sinks,
        )
        new = seen.ghost(text, rule)
        scores.scatter_add_(1, own, new)

    def _sinks_held(self, seen: Observation) -> int:
        """How many of the first tokens, up to `sinks`, every row still has."""
        import torch

        rows = seen.positions[:, : self.sinks]
        there = rows == torch.arange(rows.shape[1], device=rows.device, dtype=rows.dtype)
        return int(there.all(0).cumprod(0).sum())


@dataclass(frozen=True)
class Ghost(SelectionPolicy):
    """Keep what a question asked afterwards would miss: judged by the context's own queries, turned on (ours).

    shift: positions by which queries are turned on. chunk: tokens that look at one another (0: all of a prompt).
    band: tokens around an entry whose ghosts judge it (0: all of the chunk). recent: newest tokens that always stay.
    """

    name: ClassVar[str] = "ghost"
    summary: ClassVar[str] = "tokens that the context itself, read once more, would look back at"
    shift: int = 512
    chunk: int = 256
    band: int = 8
    recent: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.shift >= 0, "shift", "0 or more")
        self.require(self.chunk >= 0, "chunk", "0 or more")
        self.require(self.band >= 0, "band", "0 or more")
        self.require(self.recent >= 0, "recent", "0 or more")

    def score(self) -> Score:
        """Ghosts of every chunk."""
        return GhostReplay(self.shift, self.chunk, self.band, self.sinks)
