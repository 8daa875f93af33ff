"""The one way to attend to a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompile.kernels import sdpa
from kvcompile.kernels.dispatch import differentiable
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.runtime.cache import Step
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.dense import DenseStore


def attended(queries: Tensor, kv: LayerCache, step: Step, layer: int) -> Tensor:
    """Attention of queries `[B, H_q, Q, D]` to what `kv` holds, `[B, H_q, Q, D_v]`."""
    store = kv.held
    cache = step.cache
    summed = sums(kv, queries, step)
    spec = cache.spec(layer, store.parts, summed is not None)
    attend = differentiable(cache.route) if learns(kv, queries) else cache.attend
    return attend(Queries(queries, step.positions, step.valid), store.view(), spec, summed)


def per_head(heads: Tensor, weight: Tensor) -> Tensor:
    """`heads [B, H_q, Q, in]` by `weight [H_kv, out, in]`, `[B, H_q, Q, out]`."""
    groups = weight.shape[0]
    rows = torch.unflatten(heads, 1, (groups, -1)).flatten(2, 3)
    made = rows @ weight.mT
    return torch.unflatten(made, 2, (heads.shape[1] // groups, -1)).flatten(1, 2)


@dataclass(frozen=True)
class Expansion:
    """Plain queries `[B, H_q, Q, D]`, `absorb [H_kv, d_R + d_c, D]` and `up [H_kv, D, d_c]`."""

    queries: Tensor
    absorb: Tensor
    up: Tensor

    def attended(self, absorbed: Tensor, kv: LayerCache, step: Step, layer: int) -> Tensor:
        """Attention as `[B, Q, H_q * D]`.

        A prompt that sees itself alone is expanded to keys and values of every head, which takes fewer products than
        absorbed queries do; everything else meets the rows as they are cached, also where a kernel is to add up what
        these receive.
        """
        store, count = kv.held, absorbed.shape[2]
        library = step.cache.route != "reference" and step.valid is None and not sums_wanted(kv, absorbed, step)
        if isinstance(store, DenseStore) and library and store.length == count > 1:
            out = self._expanded(absorbed, store.view(), step, step.cache.spec(layer, store.parts))
        else:
            out = per_head(attended(absorbed, kv, step, layer), self.up)
        return out.transpose(1, 2).flatten(2)

    def _expanded(self, absorbed: Tensor, view: DenseView, step: Step, spec: KernelSpec) -> Tensor:
        """Attention of every head to its own keys and values, `[B, H_q, Q, D]`."""
        queries, keys, values = self.heads(absorbed, view.keys)
        group, wide = queries.shape[1] // keys.shape[1], keys.shape[-1]
        spec = KernelSpec(spec.parts, group, wide, wide, spec.scale, spec.sliding_window, softcap=spec.softcap)
        out = sdpa.attend(Queries(queries, step.positions), DenseView(keys, values, view.positions), spec)
        return out[..., : self.up.shape[1]]

    def heads(self, absorbed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H_q, Q, d_R + D]`, keys and values `[B, H_kv, n, d_R + D]` of rows `[B, 1, n, d_R + d_c]`.

        q . k = [q_R; q] . [k_R; W_UK c], values [W_UV c; 0].
        """
        heads, _, rank = self.up.shape
        rope = rows.shape[-1] - rank
        positioned, latent = torch.split(rows, [rope, rank], -1)
        keys = torch.cat((positioned.expand(-1, heads, -1, -1), latent @ self.absorb[:, rope:]), -1)
        values = torch.nn.functional.pad(latent @ self.up.mT, (0, rope))
        return torch.cat((absorbed[..., :rope], self.queries), -1), keys, values


def sums_wanted(kv: LayerCache, queries: Tensor, step: Step) -> bool:
    """Whether the kernel of this pass adds up the attention that entries receive, so that no query need be kept."""
    s = kv.plan.selection
    if s is None or not (step.prefill or s.schedule.decode_every):
        return False
    needs, single = s.score.needs, queries.shape[2] == 1 and step.valid is None and not step.prefill
    if needs.reduce != "sum" or learns(kv, queries):
        return False
    if not needs.carries and not (single and step.due(s.schedule.decode_every)):  # sums of one query alone
        return False
    return step.cache.scores(kv.held.parts, queries.dtype)


def sums(kv: LayerCache, queries: Tensor, step: Step) -> Tensor | None:
    """Where the kernel adds up what entries receive from `queries [B, H_q, Q, D]`, `[R, n]`; None: nobody needs it."""
    if not sums_wanted(kv, queries, step):
        return None
    store = kv.held
    if kv.plan.selection is not None and kv.plan.selection.score.needs.carries:
        step.cache.summed()
    return kv.history.receive(store.batch, store.heads, max(store.lengths), step.cache.headroom, queries.device)


def learns(kv: LayerCache, queries: Tensor) -> bool:
    """Whether gradients of attention are wanted, with respect to these queries or to what `kv` holds."""
    return torch.is_grad_enabled() and (queries.requires_grad or any(x.requires_grad for x in kv.held.tensors()))
