"""Attention of a prompt to latent rows, with keys and values of every head made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcompile.kernels import sdpa
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.runtime.cache import Step
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.base import Chosen


def per_head(heads: Tensor, weight: Tensor) -> Tensor:
    """`heads [B, H_q, Q, in]` by `weight [H_kv, out, in]`, `[B, H_q, Q, out]`."""
    groups = weight.shape[0]
    rows = torch.unflatten(heads, 1, (groups, -1)).flatten(2, 3)
    projected = rows @ weight.mT
    return torch.unflatten(projected, 2, (heads.shape[1] // groups, -1)).flatten(1, 2)


@dataclass(frozen=True)
class Expansion:
    """Plain queries `[B, H_q, Q, D]`, `absorb [H_kv, d_c, D]`, or `[H_kv, d_R + d_c, D]`, and `up [H_kv, D_v, d_c]`."""

    queries: Tensor
    absorb: Tensor
    up: Tensor

    def attended(
        self,
        absorbed: Tensor,
        kv: LayerCache,
        step: Step,
        layer: int,
        sinks: Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """Attention as `[B, Q, H_q * D_v]`.

        A prompt that sees itself alone is expanded to keys and values of every head, which takes fewer products than
        absorbed queries do; everything else meets the rows as they are cached, also where a kernel is to add up what
        these receive.
        """
        count = absorbed.shape[2]
        summed = kv.reading.receives or kv.sums_wanted(absorbed, step)
        library = step.cache.backend.library_prompts and step.valid is None and not summed
        view = kv.held.view() if library and count > 1 and chosen is None else None
        if isinstance(view, DenseView) and view.keys.shape[2] == count:
            out = self._expanded(absorbed, view, step, step.cache.kernels.spec(layer, kv.held.parts), sinks)
        else:
            out = per_head(kv.attend(absorbed, step, layer, chosen, sinks), self.up)
        return out.transpose(1, 2).flatten(2)

    def _expanded(
        self, absorbed: Tensor, view: DenseView, step: Step, spec: KernelSpec, sinks: Tensor | None
    ) -> Tensor:
        """Attention of every head to its own keys and values, `[B, H_q, Q, D_v]`."""
        queries, keys, values = self.heads(absorbed, view.keys)
        group, wide = queries.shape[1] // keys.shape[1], keys.shape[-1]
        spec = replace(spec, group=group, head_dim=wide, value_dim=wide, latent=False)
        out = sdpa.attend(Queries(queries, step.positions, sinks=sinks), DenseView(keys, values, view.positions), spec)
        return out[..., : self.up.shape[1]]

    def heads(self, absorbed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H_q, Q, W]`, keys and values `[B, H_kv, n, W]` of rows `[B, 1, n, d_R + d_c]`.

        q . k = [q_R; q; 0] . [k_R; W_UK c; 0], values [W_UV c; 0], W the larger of d_R + D and D_v.
        """
        heads, wide, rank = self.up.shape
        rope = rows.shape[-1] - rank
        positioned, latent = torch.split(rows, [rope, rank], -1)
        keys = torch.cat((positioned.expand(-1, heads, -1, -1), latent @ self.absorb[:, -rank:]), -1)
        queries, values = torch.cat((absorbed[..., :rope], self.queries), -1), latent @ self.up.mT
        more = keys.shape[-1] - wide  # channels that keys have and values have not
        if more > 0:
            values = F.pad(values, (0, more))
        elif more < 0:
            queries, keys = F.pad(queries, (0, -more)), F.pad(keys, (0, -more))
        return queries, keys, values
