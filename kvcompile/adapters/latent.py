"""The projections of a layer that caches a latent in place of keys and values (MLA), and attention through them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kvcompile.adapters.layout import plain
from kvcompile.graph import ops
from kvcompile.plan.plan import Plan
from kvcompile.runtime.attention import Expansion, per_head
from kvcompile.runtime.cache import Rotary


class PerHead(nn.Module):
    """One matrix `[H_kv, out, in]` per KV head, applied to the heads of its group."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, heads: Tensor) -> Tensor:
        """`[B, H_q, Q, in]` to `[B, H_q, Q, out]`: y_h = W_{h // group} x_h."""
        return per_head(heads, self.weight)


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


class UpProjection(nn.Module):
    """What a model with latents of its own makes keys and values of them by: a weight that no call multiplies by.

    It takes the place of a plain linear layer under its name. Raises KvcompileError for another.
    """

    kvcompile_traced: ClassVar[bool] = True  # see `graph.tracer.TRACED`: it stays as it is traced

    def __init__(self, attention: nn.Module, name: str) -> None:
        super().__init__()
        self.weight = plain(attention, name).weight


@ops.leaf
def expansion(queries: Tensor, weight: Tensor) -> Expansion:
    """What attention of queries without position `[B, H, Q, D]` needs of a weight `[H (D + D_v), d_c]`."""
    by_head, dim = torch.unflatten(weight, 0, (queries.shape[1], -1)), queries.shape[-1]
    return Expansion(queries, by_head[:, :dim].mT, by_head[:, dim:])


@ops.leaf
def absorbed(positioned: Tensor, expansion: Expansion) -> Tensor:
    """Absorbed queries `[B, H, Q, d_R + d_c]`: the part with position `[B, H, Q, d_R]`, then W_UK^T q."""
    return torch.cat((positioned, per_head(expansion.queries, expansion.absorb)), -1)


def latent_rotations(rotaries: list[Rotary], plan: Plan) -> list[Rotary]:
    """The rotation of what each layer caches: of latent rows only some frequencies turn."""
    return [_only(r, p.latent.frequencies) if p.latent else r for r, p in zip(rotaries, plan.layers, strict=True)]


def _only(rotary: Rotary, frequencies: tuple[int, ...]) -> Rotary:
    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(positions)
        return ops.frequencies(cos, frequencies), ops.frequencies(sin, frequencies)

    return rotation
