"""The projections of a layer that caches a latent in place of keys and values (MLA), and attention through them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvcompile.graph import ops
from kvcompile.kernels import sdpa
from kvcompile.kernels.layout import DenseView, Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.plan.plan import Plan
from kvcompile.runtime.cache import Rotary, Step
from kvcompile.runtime.eviction import sums_wanted
from kvcompile.runtime.layer import LayerCache
from kvcompile.stores.dense import DenseStore


class PerHead(nn.Module):
    """One matrix `[H_kv, out, in]` per KV head, applied to the heads of its group."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, heads: Tensor) -> Tensor:
        """`[B, H_q, Q, in]` to `[B, H_q, Q, out]`: y_h = W_{h // group} x_h."""
        return per_head(heads, self.weight)


def per_head(heads: Tensor, weight: Tensor) -> Tensor:
    """`heads [B, H_q, Q, in]` by `weight [H_kv, out, in]`, `[B, H_q, Q, out]`."""
    groups = weight.shape[0]
    rows = torch.unflatten(heads, 1, (groups, -1)).flatten(2, 3)
    made = rows @ weight.mT
    return torch.unflatten(made, 2, (heads.shape[1] // groups, -1)).flatten(1, 2)


class Latent(nn.Module):
    """What a layer has beside its queries and its output: row = down(h), absorbed query = absorb(q), value = up(z).

    down: `[k_R; c] = W h` (`[d_R + d_c, hidden]`). absorb: `[H_kv, d_R + d_c, D]`, so that q . k = absorb(q) . row up
    to the rotation of the first d_R numbers. up: `[H_kv, D, d_c]`. `frequencies`: RoPE frequency of each pair of k_R.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; the absorbed form: its appendix C.
    """

    def __init__(self, down: nn.Linear, absorb: Tensor, up: Tensor, frequencies: tuple[int, ...]) -> None:
        super().__init__()
        self.down, self.absorb, self.up, self.frequencies = down, PerHead(absorb), PerHead(up), frequencies

    def forward(self, queries: Tensor) -> Expansion:
        """What attention of these plain queries `[B, H_q, Q, D]` needs of the weights."""
        return Expansion(queries, self.absorb.weight, self.up.weight)


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
            out = per_head(ops.attended(absorbed, kv, step, layer), self.up)
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


def latent_rotations(rotaries: list[Rotary], plan: Plan) -> list[Rotary]:
    """The rotation of what each layer caches: of latent rows only some frequencies turn."""
    return [_only(r, p.latent.frequencies) if p.latent else r for r, p in zip(rotaries, plan.layers, strict=True)]


def _only(rotary: Rotary, frequencies: tuple[int, ...]) -> Rotary:
    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(positions)
        return ops.frequencies(cos, frequencies), ops.frequencies(sin, frequencies)

    return rotation
