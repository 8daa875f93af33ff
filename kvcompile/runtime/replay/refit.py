"""Values of what stays, fitted so that queries get what the whole cache would have given them.

Attention matching (arXiv 2602.16284, section 3) in the form that paid here: values alone, towards the old ones, by the
queries of a replay, of which every layer sees the whole cache. What is left is taken as it will be stored: a fit to
exact keys leans on weights that few bits do not reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvcompile.kernels.codecs import decode, encode
from kvcompile.plan.plan import LayerPlan
from kvcompile.plan.selection import Refit
from kvcompile.plan.storage import Storage
from kvcompile.runtime.cache import KVCache
from kvcompile.runtime.observation import Observation
from kvcompile.runtime.replay.copies import Recorder, copy_of
from kvcompile.runtime.replay.replay import pieces, read, seen_by

if TYPE_CHECKING:
    from kvcompile.runtime.model import Compiled


@dataclass
class Fit:
    """The normal equations of one head's change of values D: (A^T A + ridge I) D = A^T R.

    A `[q, m]`: weights of the queries among what is left, to the `m` entries that may change, `free [m]`.
    R `[q, D]`: what their outputs have lost.
    """

    free: Tensor
    squares: Tensor
    products: Tensor

    def add(self, weights: Tensor, lost: Tensor) -> None:
        """Count some queries: `weights [q, m]`, `lost [q, D]`."""
        self.squares += weights.mT @ weights
        self.products += weights.mT @ lost

    def change(self, ridge: float) -> Tensor:
        """D `[m, D]`; the ridge is a multiple of the mean of the diagonal of A^T A."""
        dear = (ridge * self.squares.diagonal().mean()).clamp_min(torch.finfo(torch.float32).tiny)
        change: Tensor = torch.linalg.solve(self.squares + torch.diag(dear.expand(len(self.squares))), self.products)
        return change


@torch.no_grad()
def refit(compiled: Compiled, cache: KVCache, chosen: dict[int, list[Tensor]]) -> None:
    """Give the entries `chosen` other values, where their layer's selection asks for that.

    chosen: by layer, of each row the entries that stay. Nothing else in the cache changes.
    """
    asked = None if cache.replayed is None else cache.replayed.replay
    layers = [p for p in cache.plan.selected if p.index in chosen and p.selection and p.selection.refit]
    if asked is None or cache.transcript is None or not layers:
        return
    for b in range(len(cache.seen)):
        fits = {p.index: _begun(cache, b, p, chosen[p.index]) for p in layers}
        text = cache.transcript.unrepeated(b)
        if not any(fit is not None for heads in fits.values() for fit in heads) or not len(text):
            continue  # a text that is kept whole is read again once it no longer is
        copy = copy_of(cache, b)
        for piece in pieces(asked, cache.transcript.before(b), text, cache.seen[b] - len(text)):
            read(compiled, copy, piece, normed=False)
            for p in layers:
                _add(fits[p.index], copy, p, chosen[p.index], b, piece.stop - piece.first)
            copy.crop(-len(piece.ids))
            cache.read_again += len(piece.ids)
        for p in layers:
            _write(cache, b, p, chosen[p.index], fits[p.index])
        cache.transcript.done(b)
    cache.summed()


def _asked(p: LayerPlan) -> Refit:
    if p.selection is None or p.selection.refit is None:
        raise RuntimeError(f"layer {p.index} is fitted, and its selection does not ask for that")
    return p.selection.refit


def _begun(cache: KVCache, b: int, p: LayerPlan, chosen: list[Tensor]) -> list[Fit | None]:
    """A fit for each head of a sequence; None where little is dropped, or most of what stays is encoded already."""
    fits: list[Fit | None] = []
    asked = _asked(p)
    with cache.layers[p.index].at_hand() as store:
        rows = store.rows()
        for row in range(b * store.heads, (b + 1) * store.heads):
            (_, values, positions), kept = rows[row], chosen[row]
            encoded, older = kept < store.fixed(row), positions[kept] < cache.seen[b] - asked.recent
            free = (older & ~encoded).nonzero().squeeze(-1)
            much = kept.numel() == len(values) or kept.numel() > asked.most * len(values)
            if much or free.numel() <= encoded.sum():  # a few cannot make up for all, and would be bent out of shape
                fits.append(None)
                continue
            sizes = (free.numel(), free.numel()), (free.numel(), values.shape[-1])
            fits.append(Fit(free, *(torch.zeros(s, dtype=torch.float32, device=values.device) for s in sizes)))
    return fits


def _add(fits: list[Fit | None], copy: KVCache, p: LayerPlan, chosen: list[Tensor], b: int, repeated: int) -> None:
    """Count the queries of a piece that a layer has just read into the copy, the last `repeated` of which repeat it."""
    history = copy.layers[p.index].history
    if any(fit is not None for fit in fits):
        seen = seen_by(copy, p, Recorder(), chosen[0].device)
        for head, fit in enumerate(fits):
            if fit is not None:
                held = int(seen.lengths[head]) - seen.queries.shape[2]
                one = _of_head(seen, head, _asked(p).queries, repeated)
                _count(fit, one, chosen[b * len(fits) + head], held, p.storage)
    history.forget()


def _of_head(seen: Observation, head: int, queries: int, repeated: int) -> Observation:
    """What one head holds, and as many of its queries, spread evenly over the newest `repeated`."""
    total = seen.queries.shape[2]
    first, device = total - min(repeated, total), seen.queries.device
    count = min(queries, total - first)
    at = torch.linspace(first, total - 1, count, dtype=torch.float64, device=device).round().long()
    one = slice(head, head + 1)
    return replace(
        seen,
        queries=seen.queries[one, :, at],
        query_positions=seen.query_positions[at],
        keys=seen.keys[one],
        values=seen.values[one],
        positions=seen.positions[one],
        lengths=seen.lengths[one],
        sinks=None if seen.sinks is None else seen.sinks[one],
        slopes=None if seen.slopes is None else seen.slopes[one],
    )


def _count(fit: Fit, seen: Observation, kept: Tensor, held: int, storage: Storage) -> None:
    """Count what one head's queries lose where of the `held` first entries only those `kept [m]` are left, as stored.

    p = softmax over everything,  p' = softmax over what is left, with its keys as codes say,  A = p',  R = p V - p' V
    """
    values = seen.values[0].float()
    left = torch.cat((kept, torch.arange(held, len(values), dtype=torch.int64, device=kept.device)))
    keys = torch.cat((_decoded(seen.keys[0, kept], storage), seen.keys[0, held:]))
    rest = replace(
        seen,
        keys=keys.unsqueeze(0),
        values=seen.values[:, left],
        positions=seen.positions[:, left],
        lengths=seen.lengths - held + kept.numel(),
    )
    weights = rest.attention()[0].flatten(0, 1)
    fit.add(weights[:, fit.free], seen.attention()[0].flatten(0, 1) @ values - weights @ values[left])


def _decoded(keys: Tensor, storage: Storage) -> Tensor:
    """Keys `[m, D]` of a row as they come back: the oldest ones encoded, those of the residual as they are."""
    encoded = storage.encoded(len(keys))
    if storage.key is None or not encoded:
        return keys
    return torch.cat((decode(*encode(keys[:encoded], storage.key), storage.key, keys.dtype), keys[encoded:]))


def _write(cache: KVCache, b: int, p: LayerPlan, chosen: list[Tensor], fits: list[Fit | None]) -> None:
    """Put the fitted values into the cache."""
    layer, stretches = cache.layers[p.index], {}
    with layer.at_hand() as store:
        rows = store.rows()
        for head, fit in enumerate(fits):
            if fit is None:
                continue
            row = b * len(fits) + head
            fixed, values = store.fixed(row), rows[row][1].float()
            values[chosen[row][fit.free]] += fit.change(_asked(p).ridge)
            stretches[row] = fixed, values[fixed:].to(rows[row][1].dtype)
        if stretches:
            layer.changed()
            store.revalue(stretches)


__all__ = ["refit"]
