"""The model reads a text again: what the queries of that pay to its first copy is what a score counts.

For each piece of the text it is asked to repeat it, and given the answer (KVzip, arXiv 2505.23416, section 3). The
pass sees all that the cache holds; a score sees the sinks, the piece, and what has been read of the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import Replay, Score
from kvcompile.runtime import eviction
from kvcompile.runtime.cache import KVCache, Step
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.replay.copies import copy_of
from kvcompile.runtime.replay.norms import Norms

if TYPE_CHECKING:
    from kvcompile.runtime.model import Compiled


@dataclass(frozen=True)
class Piece:
    """A stretch of the text, true positions `first : stop`, and all that is read to repeat it, ids `[R]`."""

    first: int
    stop: int
    ids: Tensor


@torch.no_grad()
def replay(compiled: Compiled, cache: KVCache, concerned: list[bool]) -> None:
    """Have a model repeat what the `concerned` sequences have read since the last time, and the scores count that.

    What scores carry of the new tokens is counted; nothing else in the cache changes.
    """
    asked, transcript = None if cache.replayed is None else cache.replayed.replay, cache.transcript
    if asked is None or transcript is None or None in (asked.first, asked.later, asked.closing):
        raise RuntimeError("a replay without a plan for it, or without its prompts")
    normed = any(p.selection is not None and p.selection.score.needs.norms for p in cache.plan.selected)
    for b in (b for b, here in enumerate(concerned) if here and not _spared(cache, b)):
        start = cache.seen[b] - len(transcript.unrepeated(b))
        copy = copy_of(cache, b)
        for piece in pieces(asked, transcript.before(b), transcript.unrepeated(b), start):
            norms = read(compiled, copy, piece, normed)
            for p in cache.plan.selected:
                _count(cache, b, copy, p, piece, norms)
            copy.crop(-len(piece.ids))
            cache.read_again += len(piece.ids)
        transcript.done(b)
    cache.summed()


def seen_by(copy: KVCache, p: LayerPlan, score: Score, device: torch.device) -> Observation:
    """What a layer of the copy of a cache holds after `read`, and those queries of that which a score needs."""
    step = Step(copy, torch.empty(1, 0, dtype=torch.int64, device=device), None, prefill=True, last=False)
    return eviction.observation(copy.layers[p.index], step, p, score)


def _spared(cache: KVCache, b: int) -> bool:
    """Whether nothing of sequence b will be scored, as every layer's budget holds all of it."""
    spans = [(p.selection, p.span(cache.seen[b])) for p in cache.plan.selected]
    return all(s is None or s.spares(span) for s, span in spans)


def pieces(asked: Replay, before: Tensor, text: Tensor, start: int) -> Iterator[Piece]:
    """The pieces of a `text [n]` that begins at true position `start`, in order.

    before: the tokens before it, as many as the prompt of a later piece repeats.
    """
    known = torch.cat((before, text))
    for first in range(0, len(text), asked.chunk):
        piece = text[first : first + asked.chunk]
        end = len(before) + first
        prompt = asked.first if start + first == 0 else asked.later
        words, closing = (text.new_tensor(ids or ()) for ids in (prompt, asked.closing))
        overlap = known[max(0, end - asked.overlap) : end]
        yield Piece(start + first, start + first + len(piece), torch.cat((words, overlap, closing, piece)))


def read(compiled: Compiled, copy: KVCache, piece: Piece, normed: bool) -> Norms | None:
    """Read a piece into the copy of a cache; the norms of that pass, where scores ask for them (`normed`)."""
    ids = piece.ids.unsqueeze(0)
    at = torch.arange(copy.seen[0], copy.seen[0] + ids.shape[1], device=ids.device, dtype=torch.int64).unsqueeze(0)
    copy.chunk(prompting=True, last=False)
    out = compiled.entry(embeddings=False, states=normed)(ids, None, at, copy, slice(0, 1))
    return Norms(compiled, out[1]) if normed else None


def _count(cache: KVCache, b: int, copy: KVCache, p: LayerPlan, piece: Piece, norms: Norms | None) -> None:
    """Let the score of a layer see the queries of a piece, and carry what it makes of the piece's entries."""
    layer, history = copy.layers[p.index], cache.layers[p.index].history
    s, read = p.selection, cache.seen[b]
    if s is None:
        raise RuntimeError(f"layer {p.index} selects nothing")
    seen = seen_by(copy, p, s.score, piece.ids.device)
    repeated = (seen.positions >= piece.first) & (seen.positions < piece.stop)
    shown = repeated | ((seen.positions >= 0) & (seen.positions < s.sinks)) | (seen.positions >= read)
    part = _narrowed(seen, shown)
    counted = s.score.observe(part if norms is None else norms.shown(part, cache.plan))
    heads, entries = seen.keys.shape[0], seen.keys.shape[1] - len(piece.ids)
    history.recount(b, len(cache.seen), repeated[:, :entries], counted[repeated[shown].view(heads, -1)])
    layer.history.forget()


def _narrowed(seen: Observation, shown: Tensor) -> Observation:
    """What a score sees where only the entries `shown [H_kv, n]` are there, equally many in every row."""
    heads = shown.shape[0]
    columns = shown.nonzero()[:, 1].view(heads, -1)
    wide = columns.unsqueeze(-1)
    return replace(
        seen,
        keys=seen.keys.take_along_dim(wide, 1),
        values=seen.values.take_along_dim(wide, 1),
        positions=seen.positions.take_along_dim(columns, 1),
        lengths=torch.full_like(seen.lengths, columns.shape[1]),
        carried=None,
    )
