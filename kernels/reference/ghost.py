"""What entries mean to the queries of their own text, read once more from further on: scores without a second forward.

Plain torch: the oracle of generated kernels, and what backends without one run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels.reference.attention import softmax
from kvcompile.plan.ghost import GhostRule

QUERY_BLOCK = 256  # tokens whose logits are held at a time
LEAST = 1e-6  # of 1 - p, which is divided by


@dataclass(frozen=True)
class GhostSpec:
    """One specialised scorer: everything here may be compiled in.

    group: query heads of a KV head. dtype: of queries, keys and values. sink: each query head brings a learned logit.
    """

    rule: GhostRule
    group: int
    head_dim: int
    value_dim: int
    dtype: str
    sink: bool = False

    @property
    def name(self) -> str:
        """Readable and unique up to the scale: `ghost-c256-b8-s4-float32-g3-d64`."""
        rule = self.rule
        dims = f"d{self.head_dim}" + (f"v{self.value_dim}" if self.value_dim != self.head_dim else "")
        extras = (f"-cap{rule.softcap:g}" if rule.softcap else "") + ("-sink" if self.sink else "")
        return f"ghost-c{rule.chunk}-b{rule.band}-s{rule.own_from}-{self.dtype}-g{self.group}-{dims}{extras}"


@dataclass(frozen=True)
class Reread:
    """W tokens of a text, one after the other, and the queries that read them once more.

    queries: of these tokens, as they met the keys, `[H_kv, g, W, D]`. ghosts: the same queries, turned on.
    keys, values: of these tokens, `[H_kv, W, D]` and `[H_kv, W, D_v]`.
    sinks: keys `[H_kv, s, D]` and values `[H_kv, s, D_v]` of the tokens at true positions 0 to s - 1.
    start: true position of the first of the W tokens.
    learned: logits `[H_kv, g]` that weigh in every softmax and go to no entry; None: there are none.
    """

    queries: Tensor
    ghosts: Tensor
    keys: Tensor
    values: Tensor
    sinks: tuple[Tensor, Tensor]
    start: int = 0
    learned: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Queries, ghosts, keys, values, keys and values of sinks: all of one dtype."""
        return self.queries, self.ghosts, self.keys, self.values, *self.sinks


Scorer = Callable[[Reread, GhostRule], Tensor]
"""A way to score, by the contract of `ghost_scores`: `[H_kv, W]`, float32."""


def spec_of(text: Reread, rule: GhostRule) -> GhostSpec:
    """The scorer that these need."""
    dtype, (_, group, _, dim) = str(text.queries.dtype).removeprefix("torch."), text.queries.shape
    return GhostSpec(rule, group, dim, text.values.shape[2], dtype, text.learned is not None)


def ghost_scores(text: Reread, rule: GhostRule) -> Tensor:
    """How much the outputs of a text's own queries, turned on, would change without each of its entries, `[H_kv, W]`.

    A query q'_t (a ghost) sees the sinks and all of its chunk, later entries too; the entries that q_t itself saw there
    weigh beside them, as if the text stood there a second time:

    g_tj = softcap(q'_t k_j * scale) over sinks and chunk,   l_tj = softcap(q_t k_j * scale) over own_from <= j <= t
    p_tj = exp(g_tj) / Z_t,   r_tj = exp(l_tj) / Z_t,   Z_t = sum_j exp(g_tj) + sum_j exp(l_tj) (+ exp(learned))
    o_t  = sum_j p_tj v_j + sum_j r_tj v_j
    s_j  = sum over |t - j| <= band, and the query heads of the group, of (p_tj / max(1 - p_tj, 1e-6))^2 |v_j - o_t|^2

    s_j is the squared change of the output where j alone is left out of it. In float32; float64 where tensors are.
    Sources: the change of the output, DropKV; what is looked at from further on, KVzip, arXiv 2505.23416.
    """
    dtype, start = torch.promote_types(text.keys.dtype, torch.float32), text.start
    keys, values, sink_keys, sink_values = (x.to(dtype) for x in (text.keys, text.values, *text.sinks))
    scores = torch.zeros(keys.shape[:2], dtype=dtype, device=keys.device)
    for begin, end in rule.chunks(start, keys.shape[1]):
        outside = min(sink_keys.shape[1], start + begin)  # sinks that are not of this chunk
        k = torch.cat((sink_keys[:, :outside], keys[:, begin:end]), 1)
        v = torch.cat((sink_values[:, :outside], values[:, begin:end]), 1)
        own = min(outside + max(0, rule.own_from - start - begin), k.shape[1])
        for first in range(begin, end, QUERY_BLOCK):
            some = slice(first, min(first + QUERY_BLOCK, end))
            q, ghost = (x[:, :, some].to(dtype) for x in (text.queries, text.ghosts))
            scores[:, begin:end] += _changes(q, ghost, k, v, (own, outside, first - begin), rule, text.learned)
    return scores.float()


def _changes(
    q: Tensor,
    ghost: Tensor,
    k: Tensor,
    v: Tensor,
    at: tuple[int, int, int],
    rule: GhostRule,
    learned: Tensor | None,
) -> Tensor:
    """What some tokens, those from the `first` of a chunk on, give its entries `[H_kv, n]`.

    k, v: sinks and chunk; at: the first column that is seen twice, the first of the chunk, and `first`.
    """
    own, outside, first = at
    columns, tokens = (torch.arange(n, device=k.device, dtype=torch.int64) for n in (k.shape[1] - outside, q.shape[2]))
    distance = columns - (tokens + first).unsqueeze(1)
    again = _logits(q, k[:, own:], rule).masked_fill((distance > 0)[:, own - outside :], float("-inf"))
    logits = torch.cat((_logits(ghost, k, rule), again), -1)
    weights = softmax(logits, None if learned is None else learned[..., None, None])
    p, r = weights[..., : k.shape[1]], weights[..., k.shape[1] :]
    outputs = p @ v.unsqueeze(1) + r @ v[:, own:].unsqueeze(1)
    return _summed(p[..., outside:], outputs, v[:, outside:], first, rule.band)


def _summed(p: Tensor, outputs: Tensor, v: Tensor, first: int, band: int) -> Tensor:
    """(p / (1 - p))^2 |v - o|^2 of entries near each token, summed over tokens and group, `[H_kv, n]`.

    p `[H_kv, g, w, n]`, outputs `[H_kv, g, w, D_v]` of the tokens from the `first` of a chunk on, v `[H_kv, n, D_v]`.
    Not |v|^2 - 2 v o + |o|^2: where p is near 1, o is near v, and little would be left of the difference.
    """
    if not band:
        exact = "donot_use_mm_for_euclid_dist"
        far = torch.cdist(outputs.flatten(1, 2), v, compute_mode=exact).view(p.shape)
        return (p / (1 - p).clamp(min=LEAST) * far).square().sum((1, 2))
    scores = torch.zeros_like(v[..., 0])
    for offset in range(first - band, first + band + 1):
        of_entry = p.diagonal(offset, 2, 3)  # p_tj with t = j - offset
        tokens, entries = (slice(at, at + of_entry.shape[2]) for at in (max(0, -offset), max(0, offset)))
        far = (outputs[:, :, tokens] - v[:, None, entries]).square().sum(-1)
        scores[:, entries] += ((of_entry / (1 - of_entry).clamp(min=LEAST)).square() * far).sum(1)
    return scores


def _logits(q: Tensor, k: Tensor, rule: GhostRule) -> Tensor:
    """`[H_kv, g, w, n]`."""
    logits: Tensor = (q * rule.scale) @ k.unsqueeze(1).mT
    return rule.softcap * torch.tanh(logits / rule.softcap) if rule.softcap else logits
