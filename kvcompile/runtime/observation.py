"""What a score may look at: one sequence, one layer, per KV head; never expanded to query heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels.reference import fall, softmax
from kvcompile.kernels.reference.ghost import Scorer, ghost_scores
from kvcompile.plan.window import oldest

QUERY_BLOCK = 256


@dataclass(frozen=True)
class Moments:
    """Count, mean `[H_kv, g, D]` and covariance `[H_kv, g, D, D]` of a sequence's queries before rotation (float32)."""

    count: int | Tensor
    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Observation:
    """One layer's cache of one sequence, and the newest queries, at the moment of a selection.

    Shapes: queries `[H_kv, g, W, D]` after rotation, oldest first; query_positions `[W]`; keys and values
    `[H_kv, n, D]` as cached (keys after rotation); positions `[H_kv, n]`, true ones, ascending, -1 past a row's end.
    `lengths [H_kv]` are the rows' entries, `tokens` the number of tokens the sequence has seen.
    `carried [H_kv, n]` is the state of a score that carries one (zeros for new entries).
    `column_sums [H_kv, n]`: attention to each entry, mean over the group and summed over the queries that only the
    kernel has seen, which are not among `queries` unless the score needs one query (None: there are none).
    `window_attention [H_kv, n]`: attention of `queries` to each entry, mean over them and the group, where a kernel
    added it up.
    `mean_rotation(horizon)` is the rotation `[D, D]` averaged over the next `horizon` positions (row vectors: q @ R);
    `rotation(positions)` is the rotation `[D, D]` by so many positions (row vectors: q @ R), where a score needs it;
    `ghost` scores entries by what queries that were turned on look back at, as the backend does;
    `value_norms [H_kv, g, n]`: ||W_O v_j||, how far an entry at weight 1 moves the state that query head g adds to, and
    `hidden_norms [H_kv, g, W]`: ||h_i||, the length of that state where each query was made (None: not asked for).
    `sinks [H_kv, g]`: learned logits that weigh in every softmax and go to no entry (None: there are none).
    `slopes [H_kv, g]`: what logits fall by with every token of distance (None: they do not), `rounded` as kernels do.
    `layer` is the index in the model.
    """

    queries: Tensor
    query_positions: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    tokens: int
    scale: float
    softcap: float | None = None
    sliding_window: int | None = None
    chunked: bool = False
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    rounded: bool = False
    carried: Tensor | None = None
    column_sums: Tensor | None = None
    window_attention: Tensor | None = None
    moments: Moments | None = None
    mean_rotation: Callable[[int], Tensor] | None = None
    rotation: Callable[[int], Tensor] | None = None
    ghost: Scorer = ghost_scores
    value_norms: Tensor | None = None
    hidden_norms: Tensor | None = None
    layer: int = 0

    @property
    def alive(self) -> Tensor:
        """Entries that the next query can see, bool `[H_kv, n]`."""
        if not self.sliding_window or self.chunked:
            return self.positions >= 0
        return self.positions >= max(0, oldest(self.tokens, self.sliding_window))

    def attention(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Attention of queries `start:stop` to every entry, `[H_kv, g, w, n]`, float32, causal by true position.

        A = softmax_j(softcap(q_i k_j * scale) - m (p_i - p_j)), over all entries the query may see. Rows sum to 1,
        or to what a sink leaves of it.
        """
        queries = self.queries[:, :, start:stop].float() * self.scale
        at = self.query_positions[start:stop]
        heads, group, rows, dim = queries.shape
        folded = torch.bmm(queries.reshape(heads, group * rows, dim), self.keys.float().mT)
        logits = folded.view(heads, group, rows, -1)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.slopes is not None:
            slopes, entries = self.slopes[..., None, None], self.positions[:, None, None]
            logits = logits + fall(slopes, entries, at.view(-1, 1), self.scale, self.rounded)
        plain = self._seen_by_all(at)
        entries = self.positions[:, None, None, plain:]
        hidden = (entries > at.view(-1, 1)) | (entries < 0)
        if self.sliding_window:
            hidden = hidden | (entries < oldest(at.view(-1, 1), self.sliding_window, self.chunked))
        logits[..., plain:].masked_fill_(hidden, float("-inf"))
        weights = self.softmax(logits)
        return weights if plain else weights.nan_to_num_(0.0)

    def softmax(self, logits: Tensor) -> Tensor:
        """Over the entries of `logits [H_kv, g, ..., n]`, with what goes to a sink in the denominator."""
        sinks = self.sinks
        return softmax(logits, None if sinks is None else sinks.view(*sinks.shape, *(1,) * (logits.dim() - 2)))

    def mean_attention(self) -> Tensor:
        """Attention of all `queries` to every entry, mean over them and the group, `[H_kv, n]`, float32."""
        return self.attention().mean(dim=(1, 2)) if self.window_attention is None else self.window_attention

    def _seen_by_all(self, at: Tensor) -> int:
        """How many entries, from the oldest on, every query at positions `at` surely sees in every row."""
        if self.sliding_window or not at.numel():
            return 0
        return int(((self.positions >= 0) & (self.positions <= at.min())).sum(1).min())  # rows ascend

    def attention_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`(query positions [w], attention [H_kv, g, w, n])` in blocks, so that no full matrix is held."""
        for start in range(0, self.queries.shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, self.queries.shape[2])
            yield self.query_positions[start:stop], self.attention(start, stop)


def pool(votes: Tensor, kernel: int, kind: Literal["avg", "max"], among: Tensor) -> Tensor:
    """Votes `[H_kv, n]`, none negative, pooled along the sequence with stride 1, over the entries `among` (bool).

    Averages divide by the entries really there, so that no edge is attenuated; entries outside keep their votes.
    """
    inside = among.to(votes.dtype)
    if kind == "max" and torch.compiler.is_compiling():  # max_pool1d would fix the length in a trace
        pooled = F.pad(votes * inside, (kernel // 2,) * 2).unfold(-1, kernel, 1).amax(-1)
    elif kind == "max":
        pooled = F.max_pool1d(votes * inside, kernel, 1, kernel // 2)
    else:
        sums, counts = F.pad(torch.stack((votes * inside, inside)), (kernel // 2,) * 2).unfold(-1, kernel, 1).sum(-1)
        pooled = sums / counts
    return torch.where(among, pooled, votes)
