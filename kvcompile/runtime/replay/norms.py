"""How far an entry moves the state that attention adds to, and how long that state is: the parts of KVzip+."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.runtime.observation import Observation

if TYPE_CHECKING:
    from kvcompile.runtime.model import Compiled


class Norms:
    """||W_O v|| and ||h|| of one pass.

    states: what entered each layer in it, `[1, R, hidden]`.
    Source: KVzip+ in KVzap, arXiv 2601.07891: attention adds a W_O v to the state h.
    """

    def __init__(self, compiled: Compiled, states: tuple[Tensor, ...]) -> None:
        self.compiled = compiled
        self.hidden = [x[0].float().norm(dim=-1) for x in states]

    def shown(self, seen: Observation, plan: Plan) -> Observation:
        """What a score sees of a layer, with `value_norms [H_kv, g, n]` and `hidden_norms [H_kv, g, R]` in it, float32.

        The group has the query heads of every layer that reads the cache of this one.
        """
        heads, values = seen.values.shape[0], seen.values.float()
        value_norms, hidden_norms = [], []
        for q in (q for q in plan.layers if q.owner == seen.layer):
            gram = torch.unflatten(self._gram(q, seen.values), 0, (heads, -1))  # [H_kv, g, D_v, D_v]
            squares = torch.einsum("hnd,hgde,hne->hgn", values, gram, values)
            value_norms.append(squares.clamp(min=0).sqrt())
            hidden_norms.append(self.hidden[q.index].expand(heads, gram.shape[1], -1))
        return replace(seen, value_norms=torch.cat(value_norms, 1), hidden_norms=torch.cat(hidden_norms, 1))

    def _gram(self, q: LayerPlan, like: Tensor) -> Tensor:
        """W_h^T W_h of each query head's part of the output projection, `[H_q, D_v, D_v]`, float32.

        A latent is a value once its up-projection has made one of it.
        """
        graph, name = self.compiled.graph, self.compiled.outputs[q.index]
        adapter: Any = graph.get_submodule(name.rpartition(".")[0])
        up = None if q.latent is None else adapter.up()
        width = q.query_heads * (q.value_dim if up is None else up.shape[1])
        weight = matrix(graph.get_submodule(name), width, like).float()
        by_head = torch.unflatten(weight, 1, (q.query_heads, -1)).transpose(0, 1)  # [H_q, hidden, D]
        if up is not None:
            by_head = by_head @ up.float().repeat_interleave(q.query_heads // up.shape[0], 0)
        return by_head.mT @ by_head


def matrix(module: nn.Module, width: int, like: Tensor) -> Tensor:
    """The matrix `[out, width]` by which a module multiplies rows, an offset left out; of a linear layer its weight."""
    if type(module) is nn.Linear:
        return module.weight
    one = next((x for x in module.parameters() if x.is_floating_point()), like)
    unit = torch.eye(width + 1, width, dtype=one.dtype, device=one.device)  # its last row is 0
    out: Tensor = module(unit)
    return (out[:-1] - out[-1]).mT
